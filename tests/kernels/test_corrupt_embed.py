"""``corrupt_embed`` against the reference in float64: odd sizes, strided maps, every corner of the mask."""

from __future__ import annotations

import pytest
import torch

from fasttrace.corruption import GaussianNoise
from fasttrace.errors import KernelError
from fasttrace.ops.corrupt_embed import corrupt_embed, reference

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

RATIO = {torch.float32: 1e-6, torch.float16: 5e-4}


def inputs(rows: int, length: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(19, width, generator=g).to(dtype)
    return [
        torch.randint(0, 19, (rows, length), generator=g),
        table,
        torch.randn(length + 2, width, generator=g).to(dtype),
        torch.rand(rows, length, generator=g) < 0.4,
        torch.rand(rows, generator=g) + 0.5,
        torch.randint(0, 50, (rows,), generator=g, dtype=torch.int32),
        torch.randint(-(2**62), 2**62, (rows,), generator=g),
    ]


def launch(arguments, guarded):
    from fasttrace.kernels.corrupt_embed.launch import corrupt_embed as triton_corrupt_embed

    ids, table = arguments[:2]
    out = guarded((*ids.shape, table.shape[1]), table.dtype)
    triton_corrupt_embed(*arguments, out=out)
    return out


def truth(arguments):
    wide = [a.double() if a.dtype.is_floating_point else a for a in arguments]
    return reference(*wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("rows", "length", "width"), [(1, 1, 8), (5, 3, 20), (3, 2, 300), (9, 5, 64)])
def test_matches_the_reference(rows, length, width, dtype, device, guarded, assert_close):
    arguments = inputs(rows, length, width, dtype)
    out = launch([guarded(a) for a in arguments], guarded)
    assert_close(out, truth(arguments), RATIO[dtype])


@pytest.mark.parametrize("mask", ["none", "all", "first_row", "last_token"])
def test_corners_of_the_mask(mask, device, guarded, assert_close):
    arguments = inputs(6, 3, 12, torch.float32)
    arguments[3] = torch.zeros(6, 3, dtype=torch.bool)
    arguments[3][{"none": ([],), "all": ..., "first_row": (0,), "last_token": (slice(None), 2)}[mask]] = True
    out = launch([guarded(a) for a in arguments], guarded)
    assert_close(out, truth(arguments), 1e-6)


def test_a_clean_row_is_the_plain_embedding_bit_for_bit(device, guarded):
    ids, table, positions, mask, sigma, sample, seed = inputs(5, 3, 16, torch.float16)
    sigma[1:3] = 0
    out = launch([guarded(a) for a in (ids, table, positions, mask, sigma, sample, seed)], guarded)
    plain = (table[ids].float() + positions[:3].float()).half()
    assert torch.equal(out.cpu()[1:3], plain[1:3])


def test_one_prompt_and_mask_for_all_rows_as_expanded_views(device, guarded, assert_close):
    arguments = inputs(7, 4, 16, torch.float32)
    for i in (0, 3):
        arguments[i] = arguments[i][:1]
    for i in (4, 6):
        arguments[i] = arguments[i][:1]
    shapes = {0: (7, 4), 3: (7, 4), 4: (7,), 6: (7,)}
    views = [guarded(a).expand(shapes[i]) if i in shapes else guarded(a) for i, a in enumerate(arguments)]
    out = launch(views, guarded)
    assert_close(out, truth([v.cpu() for v in views]), 1e-6)


def test_rows_do_not_depend_on_their_batch_mates(device, guarded):
    arguments = inputs(6, 2, 16, torch.float32)
    whole = launch([guarded(a) for a in arguments], guarded)
    per_row = {0, 3, 4, 5, 6}
    single = [a[4:5] if i in per_row else a for i, a in enumerate(arguments)]
    assert torch.equal(launch([guarded(a) for a in single], guarded)[0], whole[4])


def test_an_empty_plan_launches_nothing(device, guarded):
    out = launch([guarded(a) for a in inputs(0, 3, 8, torch.float32)], guarded)
    assert out.shape == (0, 3, 8)


def test_reference_adds_the_noise_of_the_corruption():
    ids, table, positions, mask, *_ = inputs(2, 5, 10, torch.float64)
    noise = GaussianNoise(scale=0.3, seed=11)
    sigma, sample = torch.full((2,), 0.3), torch.tensor([0, 4], dtype=torch.int32)
    out = corrupt_embed(ids, table, positions, mask, sigma.double(), sample, torch.full((2,), 11))
    for row, which in enumerate(sample.tolist()):
        drawn = noise.draw(float(sigma[row].double()), which, 5, mask[row].nonzero().flatten().tolist(), 10)
        expected = table[ids[row]] + drawn + positions[:5]
        assert (out[row] - expected).abs().max() < 1e-6


def test_arguments_may_be_given_by_name():
    *others, seed = inputs(3, 4, 8, torch.float32)
    assert torch.equal(corrupt_embed(*others, seed=seed), corrupt_embed(*others, seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_torch_matches_the_reference(width, dtype, assert_close):
    arguments = inputs(9, 5, width, dtype)
    arguments[4][3] = 0
    ratio = {torch.float64: 2e-7, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert_close(corrupt_embed(*arguments), truth(arguments), ratio)
    arguments[3][:] = False
    assert_close(corrupt_embed(*arguments), truth(arguments), ratio)


@pytest.mark.parametrize(("index", "shape"), [(2, (2, 8)), (3, (1, 3)), (4, (1,)), (5, (3,)), (6, ())])
def test_wrong_shapes_are_named(index, shape):
    arguments = inputs(2, 3, 8, torch.float32)
    arguments[index] = arguments[index].new_zeros(shape)
    with pytest.raises(KernelError, match="expected"):
        corrupt_embed(*arguments)


def test_registration_is_sound():
    op, arguments = torch.ops.fasttrace.corrupt_embed.default, tuple(inputs(2, 3, 8, torch.float32))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
