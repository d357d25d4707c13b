"""``geglu`` against the reference in float64, against diffusers, and followed by the way down."""

from __future__ import annotations

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.geglu import geglu, geglu_torch, reference
from fasttrace.ops.linear_restore import reference as linear_reference
from fasttrace.ops.restore import KEEP, ZERO, add_code, slot_code

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

TILE = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}


def inputs(rows=3, positions=7, width=20, channels=21, dtype=torch.float32, seed=0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(s, generator=g) for s in ((rows, positions, width), (2 * channels, width), (2 * channels,))
    )
    every = torch.tensor([KEEP, KEEP, ZERO, *range(rows), slot_code(1, rows), add_code(0)], dtype=torch.int32)
    source = every[torch.randint(len(every), (rows, positions), generator=g)]
    return [x.to(dtype), (weight * width**-0.5).to(dtype), bias.to(dtype), source]


def truth(given) -> torch.Tensor:
    return reference(*(t.cpu().double() if t is not None and t.dtype.is_floating_point else t for t in given))


def launch(given, guarded) -> torch.Tensor:
    from fasttrace.kernels.geglu.launch import geglu as triton_geglu

    out = guarded((*given[0].shape[:2], given[1].shape[0] // 2), given[0].dtype)
    return triton_geglu(*(t if t is None else guarded(t) for t in given), out=out, tile=TILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 7, 20, 21), (2, 16, 32, 32), (4, 5, 50, 36)], ids=str)
def test_matches_the_reference(shape, dtype, device, guarded, assert_close):
    given = inputs(*shape, dtype)
    assert_close(launch(given, guarded), truth(given), RATIO[dtype])


@pytest.mark.parametrize("absent", [2, 3], ids=["bias", "source"])
def test_what_is_optional_may_be_absent(absent, device, guarded, assert_close):
    given = inputs()
    given[absent] = None
    assert_close(launch(given, guarded), truth(given), 1e-6)


@pytest.mark.parametrize(("code", "read"), [(KEEP, True), (add_code(0), True), (ZERO, False), (slot_code(0, 3), False)])
def test_blocks_that_nobody_reads_are_zero_whatever_their_input(code, read, device, guarded):
    x, weight, bias, _ = inputs()
    source = torch.full((1, 1), code, dtype=torch.int32).expand(3, 7)
    if not read:
        x = torch.full_like(x, torch.nan)
    out = launch([x, weight, bias, source.contiguous()], guarded)
    assert bool((out != 0).all() if read else (out == 0).all())


def test_an_mlp_in_two_kernels_reads_nothing_that_was_left_out(device, guarded, assert_close):
    from fasttrace.kernels.linear_restore.launch import linear_restore as triton_linear_restore

    x, weight, bias, source = inputs(seed=3)
    source[2] = KEEP
    source[:2][(source[:2] >= 0) & (source[:2] < 3)] = 2
    down, residual, bank = torch.randn(9, 21), torch.randn(3, 7, 9), torch.randn(2, 7, 9)
    hidden = launch([x, weight, bias, source], guarded)
    out = triton_linear_restore(
        hidden, *(t if t is None else guarded(t) for t in (down, None, residual, source, bank)), tile=TILE
    )
    up = reference(*(t.double() for t in (x, weight, bias)))
    expected = linear_reference(up, down.double(), None, residual.double(), source, bank.double())
    assert_close(out, expected, 1e-6)


def test_an_empty_plan_launches_nothing(device, guarded):
    assert launch([*inputs(0, 4)[:3], torch.zeros(0, 4, dtype=torch.int32)], guarded).shape == (0, 4, 21)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 16])
def test_every_config_at_true_shapes(rows, dtype, assert_close):
    given = [t.cuda() for t in inputs(rows, 256, 320, 1280, dtype)]
    assert_close(geglu(*given, implementation="triton"), reference(*given), 1e-2)


def test_the_reference_is_that_of_diffusers(assert_close):
    activations = pytest.importorskip("diffusers.models.activations")
    x, weight, bias, _ = inputs()
    module = activations.GEGLU(20, 21)
    module.load_state_dict({"proj.weight": weight, "proj.bias": bias})
    assert_close(reference(x, weight, bias), module(x), 1e-6)


def test_the_torch_implementation_matches_too(assert_close):
    given = inputs()
    assert_close(geglu_torch(*given), truth(given), 1e-6)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_wrong_shapes_are_named(index):
    given = inputs()
    given[index] = given[index].new_zeros(2, 2)
    with pytest.raises(KernelError, match="expected"):
        geglu(*given)


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.fasttrace.geglu.default, tuple(inputs()))
