"""``residual_restore`` against the reference in float64: every code of a source map, noise, scale, odd sizes."""

from __future__ import annotations

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.residual_restore import reference, residual_restore, residual_torch
from fasttrace.ops.restore import KEEP, ZERO, add_code, restore, slot_code

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

TILE = {"BM": 16, "BC": 16, "num_warps": 4}
RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}
SLOTS = 2


def inputs(rows=3, positions=7, channels=20, dtype=torch.float32, *, noise=False, scale=1.0, bias=False) -> list:
    g = torch.Generator().manual_seed(rows * positions)
    hidden, shortcut, bank = (torch.randn(n, positions, channels, generator=g).to(dtype) for n in (rows, rows, SLOTS))
    every = [KEEP, KEEP, ZERO, *range(rows), *(slot_code(s, rows) for s in range(SLOTS)), *map(add_code, range(SLOTS))]
    source = torch.tensor(every, dtype=torch.int32)[torch.randint(len(every), (rows, positions), generator=g)]
    drawn = None
    if noise:
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=g)
        drawn = [torch.rand(rows, generator=g), seeds, torch.rand(rows, positions, generator=g) < 0.5]
    return [
        hidden,
        shortcut,
        source,
        bank,
        drawn,
        scale,
        torch.randn(channels, generator=g).to(dtype) if bias else None,
    ]


def mapped(given: list, function) -> list:
    """``function`` of every tensor."""
    return [
        function(v) if isinstance(v, torch.Tensor) else [function(t) for t in v] if isinstance(v, list) else v
        for v in given
    ]


def truth(given: list) -> torch.Tensor:
    return reference(*mapped(given, lambda t: t.cpu().double() if t.dtype.is_floating_point else t.cpu()))


def launch(given: list, guarded) -> torch.Tensor:
    from fasttrace.kernels.epilogue.launch import residual_restore as triton_residual_restore

    return triton_residual_restore(*given, out=guarded(tuple(given[0].shape), given[0].dtype), tile=TILE)


@pytest.mark.parametrize("options", [{}, {"noise": True}, {"scale": 1.5, "bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 7, 33)], ids=str)
def test_matches_the_reference(shape, dtype, options, device, guarded, assert_close):
    given = inputs(*shape, dtype, **options)
    assert_close(launch(mapped(given, guarded), guarded), truth(given), RATIO[dtype])


@pytest.mark.parametrize("code", [KEEP, ZERO, 1, slot_code(1, 3), add_code(1)])
def test_one_code_for_all_as_an_expanded_map(code, device, guarded, assert_close):
    given = inputs()
    given[2] = torch.tensor([[code]], dtype=torch.int32)
    there = mapped(given, guarded)
    for each in (given, there):
        each[2] = each[2].expand(3, 7)
        each[3] = each[3][:, :1].expand(SLOTS, 7, 20)
    assert_close(launch(there, guarded), truth(given), 1e-6)


def test_a_copied_position_is_its_source_bit_for_bit(device, guarded):
    given = inputs(dtype=torch.float16, scale=3.0)
    plain = launch(
        mapped([*given[:2], torch.full((3, 7), KEEP, dtype=torch.int32), None, None, 3.0, None], guarded), guarded
    )
    patched = launch(mapped(given, guarded), guarded)
    copied = (given[2] >= 0) & (given[2] < 3)
    assert copied.any()
    assert torch.equal(patched.cpu()[copied], restore(plain.cpu(), given[2], given[3])[copied])


def test_inputs_of_overwritten_positions_are_never_used(device, guarded, assert_close):
    given = inputs()
    given[2] = torch.tensor([[slot_code(0, 3)] * 7, [KEEP] * 7, [1] * 6 + [ZERO]], dtype=torch.int32)
    expected = truth(given)
    for tensor in given[:2]:
        tensor[0] = tensor[2] = torch.nan
    assert_close(launch(mapped(given, guarded), guarded), expected, 1e-6)


def test_a_channels_last_value_is_taken_as_it_lies(device, guarded, assert_close):
    given = inputs(2, 12, 8)
    spatial = given[0].transpose(1, 2).reshape(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    there = mapped(given, guarded)
    there[0] = spatial.to(device).flatten(2).transpose(1, 2)
    assert there[0].stride(-1) == 1
    assert_close(launch(there, guarded), truth(given), 1e-6)


def test_an_empty_plan_launches_nothing(device, guarded):
    given = [*inputs()[:2], torch.zeros(0, 7, dtype=torch.int32), None, None, 1.0, None]
    given[0], given[1] = given[0][:0], given[1][:0]
    assert launch(mapped(given, guarded), guarded).shape == (0, 7, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 320), (16, 64, 1280)], ids=str)
def test_the_config_at_true_shapes(shape, dtype, assert_close):
    given = mapped(inputs(*shape, dtype, noise=shape[0] == 2, bias=shape[0] == 16), torch.Tensor.cuda)
    assert_close(residual_restore(*given, implementation="triton"), reference(*given), 1e-2)


@pytest.mark.parametrize("options", [{}, {"noise": True, "scale": 2.0, "bias": True}], ids=str)
def test_the_torch_implementation_matches_too(options, assert_close):
    given = inputs(**options)
    assert_close(residual_torch(*given), truth(given), 1e-6)


@pytest.mark.parametrize(("index", "name"), [(0, "hidden"), (1, "shortcut"), (2, "source"), (3, "bank"), (6, "bias")])
def test_wrong_shapes_are_named(index, name):
    given = inputs(bias=True)
    given[index] = given[index].new_zeros(2, 2, 2)
    with pytest.raises(KernelError, match=f"{name} .*expected"):
        residual_restore(*given)


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.fasttrace.residual_restore.default, tuple(inputs(noise=True, bias=True)))
