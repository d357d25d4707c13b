"""``rank_update`` against float64: many shapes, ranks, layouts and storage types in one call."""

from __future__ import annotations

import pytest
import torch

from fasttrace._ext import load_error
from fasttrace.errors import KernelError
from fasttrace.ops.rank_update import rank_update, reference, update_torch

TILE = {"BM": 16, "BN": 32, "num_warps": 4}
SHAPES = [(17, 33, 1), (16, 32, 4), (1, 1, 1), (0, 5, 2), (5, 0, 2), (20, 40, 17), (7, 9, 64), (3, 4, 0)]
RATIO = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def problem(dtype=torch.float32, shapes=SHAPES, factors=torch.float32):
    g = torch.Generator().manual_seed(len(shapes))
    weights = [torch.randn(n, k, generator=g).to(dtype) for n, k, _ in shapes]
    left = [torch.randn(n, r, generator=g).to(factors) for n, _, r in shapes]
    right = [torch.randn(k, r, generator=g).to(factors) for _, k, r in shapes]
    return weights, left, right


def truth(weights, left, right):
    return [
        w.cpu().double() + a.cpu().double() @ b.cpu().double().T for w, a, b in zip(weights, left, right, strict=True)
    ]


@pytest.fixture
def check(assert_close):
    def compare(out, given):
        for actual, expected in zip(out, truth(*given), strict=True):
            if expected.numel():
                assert_close(actual, expected, RATIO[actual.dtype])

    return compare


@pytest.fixture
def launch():
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    from fasttrace.kernels.rank_update.launch import rank_update as triton_rank_update

    return lambda *tensors: triton_rank_update(*tensors, tile=TILE)


@pytest.mark.parametrize("factors", [torch.float32, torch.float16], ids=["fp32_factors", "fp16_factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_many_shapes_and_ranks_in_one_launch(dtype, factors, device, guarded, launch, check):
    given = problem(dtype, factors=factors)
    there = [[guarded(t) for t in tensors] for tensors in given]
    out = [guarded(tuple(w.shape), dtype) for w in given[0]]
    launch(*there, out)
    check(out, given)


def test_in_place(device, guarded, launch, check):
    given = problem(torch.float16)
    weights, left, right = ([guarded(t) for t in tensors] for tensors in given)
    launch(weights, left, right, weights)
    check(weights, given)


def test_transposed_factors_and_rows_that_lie_apart(device, guarded, launch, check):
    given = problem(shapes=[(17, 33, 3), (16, 32, 5)])
    padded = [torch.full((w.shape[0], w.shape[1] + 7), torch.nan) for w in given[0]]
    for wide, w in zip(padded, given[0], strict=True):
        wide[:, :-7] = w
    weights = [guarded(wide)[:, :-7] for wide in padded]
    left, right = ([guarded(t.T.contiguous()).T for t in factors] for factors in given[1:])
    out = [guarded(tuple(w.shape)) for w in weights]
    launch(weights, left, right, out)
    check(out, given)


def test_an_empty_list_launches_nothing(launch):
    launch([], [], [], [])
    assert rank_update([], [], []) == []


@pytest.mark.parametrize("which", [1, 2], ids=["left", "right"])
def test_factors_elsewhere_are_refused(which, launch):
    given = [list(tensors) for tensors in problem(shapes=[(4, 6, 2), (3, 5, 1)])]
    given[which][1] = given[which][1].to("meta")
    with pytest.raises(KernelError, match="matrix 1 has its weight on cpu"):
        rank_update(*given)
    with pytest.raises(ValueError, match="cpu, meta: one launch"):
        launch(*given, given[0])


def test_a_cold_table_is_refused_inside_a_capture(monkeypatch):
    from fasttrace.kernels.rank_update.launch import _table

    columns = ((1, 2, 3),)
    warm = _table(columns, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _table(columns, torch.device("cpu")) is warm
    with pytest.raises(ValueError, match="call once before the graph is captured"):
        _table(columns, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_true_shapes(dtype, rank, implementation, check):
    given = problem(dtype, [(320, 768, rank), (1280, 768, rank), (768, 3072, rank)] * 40)
    there = [[t.cuda() for t in tensors] for tensors in given]
    if implementation == "cuda" and load_error() is not None:
        pytest.skip(f"csrc/: {load_error()}")
    check(rank_update(*there, implementation=implementation), given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apply", [reference, update_torch])
def test_implementations_on_the_cpu(apply, dtype, check):
    given = problem(dtype, factors=torch.promote_types(dtype, torch.float32))
    out = [torch.full_like(w, torch.nan) for w in given[0]]
    apply(*given, out)
    check(out, given)


def test_half_precision_larger_than_a_block(check):
    given = problem(torch.float16, [(3000, 1000, 2)])
    check(rank_update(*given), given)


def test_precision_fades_no_faster_than_a_sum_must(assert_close):
    rank = 300
    given = problem(torch.float32, [(64, 3072, rank)])
    # A BLAS may add the terms one by one; their roundings of half an eps then add up like a random walk.
    limit = torch.finfo(torch.float32).eps / 2 * rank**0.5
    assert_close(rank_update(*given)[0], truth(*given)[0], limit)


@pytest.mark.parametrize("kind", ["new", "out", "inplace"])
def test_where_the_result_goes(kind, check):
    given = problem()
    weights = [w.clone() for w in given[0]]
    versions = [w._version for w in weights]
    given_out = [torch.full_like(w, torch.nan) for w in weights] if kind == "out" else None
    out = rank_update(weights, *given[1:], out=given_out, inplace=kind == "inplace")
    check(out, given)
    if kind == "inplace":
        assert all(o is w for o, w in zip(out, weights, strict=True))
        assert all(w._version > v for w, v in zip(weights, versions, strict=True) if w.numel())
    else:
        assert all(torch.equal(w, before) for w, before in zip(weights, given[0], strict=True))
        assert given_out is None or all(o is g for o, g in zip(out, given_out, strict=True))


def test_parameters_are_edited_without_a_gradient():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    rank_update([weight], [torch.ones(2, 1)], [torch.ones(3, 1)], inplace=True)
    assert torch.equal(weight, torch.ones(2, 3))
    assert weight.grad_fn is None


def test_what_does_not_fit_is_named():
    weights, left, right = problem(shapes=[(4, 6, 2)])
    for bad, message in (
        ({"weights": weights, "left": left, "right": []}, "0 right factors"),
        ({"weights": weights, "left": right, "right": left}, r"left \[6, 2\]"),
        ({"weights": weights, "left": left, "right": right, "out": [], "inplace": False}, "0 outputs"),
        ({"weights": weights, "left": left, "right": right, "out": [weights[0].half()]}, "float16"),
        ({"weights": weights, "left": left, "right": right, "out": weights, "inplace": True}, "not both"),
        ({"weights": weights, "left": left, "right": right, "implementation": "fastest"}, "fastest"),
    ):
        with pytest.raises(KernelError, match=message):
            rank_update(**bad)


def test_registration_is_sound():
    given = problem(shapes=[(4, 6, 2), (3, 3, 1)])
    out = [torch.empty_like(w) for w in given[0]]
    torch.library.opcheck(torch.ops.fasttrace.rank_update.default, (*given, out))
