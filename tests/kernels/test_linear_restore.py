"""``linear_restore`` against the reference in float64: every code of a source map, noise, per-row edits, odd sizes."""

from __future__ import annotations

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.linear_restore import linear_epilogue, linear_restore, linear_torch, reference
from fasttrace.ops.restore import KEEP, ZERO, add_code, slot_code

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

TILE = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}
SLOTS = 3


def codes(rows: int, positions: int, seed: int = 0) -> torch.Tensor:
    """A map in which every code occurs, chains and copies of oneself included."""
    every = [KEEP, KEEP, ZERO, *range(rows), *(slot_code(s, rows) for s in range(SLOTS)), *map(add_code, range(SLOTS))]
    chosen = torch.randint(len(every), (rows, positions), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(every, dtype=torch.int32)[chosen]


def inputs(
    rows=3, positions=7, width=20, channels=21, dtype=torch.float32, *, noise=False, rank=0, gate=False, seed=0
) -> dict:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    given = {
        "x": normal(rows, positions, width),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "residual": normal(rows, positions, channels),
        "source": codes(rows, positions, seed),
        "bank": normal(SLOTS, positions, channels),
        "noise": None,
        "low_rank": None,
        "gate": None,
    }
    if noise:
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=g)
        given["noise"] = [torch.rand(rows, generator=g) + 0.5, seeds, torch.rand(rows, positions, generator=g) < 0.4]
    if rank:
        given["low_rank"] = [normal(rows, positions, rank), normal(rows, channels, rank)]
    if gate:
        given["gate"] = normal(rows, channels)
    return given


def mapped(given: dict, function) -> dict:
    """``function`` of every tensor."""
    each = {n: [function(t) for t in v] if isinstance(v, list) else v for n, v in given.items()}
    return {n: function(v) if isinstance(v, torch.Tensor) else v for n, v in each.items()}


def truth(given: dict) -> torch.Tensor:
    return reference(**mapped(given, lambda t: t.cpu().double() if t.dtype.is_floating_point else t.cpu()))


def launch(given: dict, guarded) -> torch.Tensor:
    from fasttrace.kernels.linear_restore.launch import linear_restore as triton_linear_restore

    out = guarded((*given["x"].shape[:2], given["weight"].shape[0]), given["x"].dtype)
    return triton_linear_restore(**given, out=out, tile=TILE)


OPTIONS = [{}, {"noise": True}, {"rank": 1}, {"gate": True}, {"noise": True, "rank": 17, "gate": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 7, 20, 21), (2, 8, 32, 32)], ids=str)
def test_matches_the_reference(shape, dtype, options, device, guarded, assert_close):
    given = inputs(*shape, dtype, **options)
    assert_close(launch(mapped(given, guarded), guarded), truth(given), RATIO[dtype])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_product_with_one_pass_after_it_matches_too(dtype, options, device, guarded, assert_close):
    given = inputs(dtype=dtype, **options)
    assert_close(linear_epilogue(**mapped(given, guarded)), truth(given), 2 * RATIO[dtype])


@pytest.mark.parametrize("absent", ["bias", "residual", "bank"])
def test_what_is_optional_may_be_absent_there_too(absent, device, guarded, assert_close):
    given = inputs(gate=True)
    given[absent] = None
    if absent == "bank":
        given["source"] = given["source"].clamp(ZERO, 2)
    assert_close(linear_epilogue(**mapped(given, guarded)), truth(given), 1e-6)


def test_the_gate_is_the_rows_own_and_after_restoring(device, guarded, assert_close):
    given = inputs(rows=2, gate=True)
    given |= {"bank": None, "residual": None, "source": torch.tensor([[KEEP], [0]], dtype=torch.int32).expand(2, 7)}
    value = given["x"][0] @ given["weight"].T + given["bias"]
    for run in (lambda there: launch(there, guarded), lambda there: linear_epilogue(**there)):
        there = mapped({**given, "source": given["source"].contiguous()}, guarded)
        assert_close(run(there)[1], value * given["gate"][1], 1e-6)


@pytest.mark.parametrize("code", [KEEP, ZERO, 1, slot_code(2, 3), add_code(1)])
def test_one_code_for_all_as_an_expanded_map(code, device, guarded, assert_close):
    given = inputs(rank=2)
    given["source"] = torch.tensor([[code]], dtype=torch.int32)
    there = mapped(given, guarded)
    for each in (given, there):
        each["source"] = each["source"].expand(3, 7)
        each["bank"] = each["bank"][:, :1].expand(SLOTS, 7, 21)
    assert_close(launch(there, guarded), truth(given), 1e-6)


@pytest.mark.parametrize("absent", ["bias", "residual", "bank"])
def test_what_is_optional_may_be_absent(absent, device, guarded, assert_close):
    given = inputs()
    given[absent] = None
    if absent == "bank":
        given["source"] = given["source"].clamp(ZERO, 2)
    assert_close(launch(mapped(given, guarded), guarded), truth(given), 1e-6)


def test_a_row_and_a_slot_that_recorded_it_copy_the_same_bit_for_bit(device, guarded):
    given = inputs(rows=4, rank=3, dtype=torch.float16)
    plain = {**given, "residual": None, "bank": None, "source": torch.full((4, 7), KEEP, dtype=torch.int32)}
    value = launch(mapped(plain, guarded), guarded)
    by_row = {**given, "source": torch.tensor([[2], [KEEP], [KEEP], [2]], dtype=torch.int32).expand(4, 7).clone()}
    by_slot = {**by_row, "bank": value.cpu(), "source": torch.where(by_row["source"] == 2, slot_code(2, 4), KEEP).int()}
    rows = launch(mapped(by_row, guarded), guarded)
    assert torch.equal(rows, launch(mapped(by_slot, guarded), guarded))
    assert torch.equal(rows.cpu()[0], given["residual"][0] + value.cpu()[2])


def test_a_row_does_not_depend_on_its_batch_mates(device, guarded):
    given = inputs(rows=5, dtype=torch.float16)
    given["source"] = torch.full((5, 7), KEEP, dtype=torch.int32)
    whole = launch(mapped(given, guarded), guarded)
    alone = {n: v[3:4] if n in ("x", "residual", "source") else v for n, v in given.items()}
    assert torch.equal(launch(mapped(alone, guarded), guarded)[0], whole[3])


def test_inputs_of_overwritten_positions_are_never_used(device, guarded, assert_close):
    given = inputs(rows=3)
    given["source"] = torch.tensor([[slot_code(0, 3)] * 7, [KEEP] * 7, [1] * 6 + [ZERO]], dtype=torch.int32)
    expected = truth(given)
    given["x"][0] = given["x"][2] = torch.nan
    assert_close(launch(mapped(given, guarded), guarded), expected, 1e-6)


def test_rows_may_lie_apart_in_memory(device, guarded, assert_close):
    given = inputs()
    there = mapped(given, guarded)
    for name in ("x", "residual", "bank"):
        wide = torch.full((*given[name].shape[:2], given[name].shape[2] + 3), torch.nan)
        wide[..., :-3] = given[name]
        there[name] = guarded(wide)[..., :-3]
    assert_close(launch(there, guarded), truth(given), 1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8)], ids=str)
def test_an_empty_plan_launches_nothing(shape, device, guarded):
    given = {**inputs(*shape), "source": torch.zeros(shape[:2], dtype=torch.int32)}
    assert launch(mapped(given, guarded), guarded).shape == (*shape[:2], 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 320, 320), (16, 256, 1280, 1280), (5, 77, 3072, 768)], ids=str)
def test_every_config_at_true_shapes(shape, dtype, assert_close):
    given = mapped(inputs(*shape, dtype, noise=shape[0] == 2, rank=4, gate=shape[0] == 5), torch.Tensor.cuda)
    for implementation in ("triton", "epilogue"):
        assert_close(linear_restore(*given.values(), implementation=implementation), reference(**given), 1e-2)


@pytest.mark.parametrize("options", [{}, {"gate": True}, {"noise": True, "rank": 4, "gate": True}], ids=str)
def test_the_torch_implementation_matches_too(options, assert_close):
    given = inputs(**options)
    assert_close(linear_torch(**given), truth(given), 1e-6)


def test_channels_must_be_adjacent(device, guarded):
    given = inputs()
    given["x"] = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    there = {**mapped(given, guarded), "x": given["x"].to(device)}
    with pytest.raises(KernelError, match="x has strides"):
        linear_restore(*there.values(), implementation="triton")


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "source", "bank", "gate"])
def test_wrong_shapes_are_named(name):
    given = inputs(gate=True)
    given[name] = given[name].new_zeros(2, 2, 2)
    with pytest.raises(KernelError, match=f"{name} .*expected"):
        linear_restore(*given.values())


def test_registration_is_sound():
    given = inputs(noise=True, rank=2, gate=True)
    torch.library.opcheck(torch.ops.fasttrace.linear_restore.default, tuple(given.values()))
