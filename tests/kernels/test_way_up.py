"""The ways up of an MLP, ``geglu`` and ``quick_gelu``, against their references in float64 and what those stand for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops.linear_restore import reference as linear_reference
from fasttrace.ops.restore import KEEP, ZERO, add_code, slot_code

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

TILE = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}
PROJECTIONS = {"geglu": 2, "gelu_up": 1, "quick_gelu": 1}  # of one input, side by side in one weight
TRUE_SHAPE = {
    "geglu": (256, 320, 1280),
    "gelu_up": (77, 1024, 4096),
    "quick_gelu": (77, 768, 3072),
}  # positions, width, channels


@pytest.fixture(params=sorted(PROJECTIONS))
def op(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"fasttrace.ops.{request.param}")


def name_of(op: ModuleType) -> str:
    return op.__name__.rpartition(".")[2]


def inputs(op: ModuleType, rows=3, positions=7, width=20, channels=21, dtype=torch.float32, seed=0) -> list:
    g = torch.Generator().manual_seed(seed)
    outputs = PROJECTIONS[name_of(op)] * channels
    x, weight, bias = (torch.randn(s, generator=g) for s in ((rows, positions, width), (outputs, width), (outputs,)))
    every = torch.tensor([KEEP, KEEP, ZERO, *range(rows), slot_code(1, rows), add_code(0)], dtype=torch.int32)
    source = every[torch.randint(len(every), (rows, positions), generator=g)]
    return [x.to(dtype), (weight * width**-0.5).to(dtype), bias.to(dtype), source]


def truth(op: ModuleType, given) -> torch.Tensor:
    return op.reference(*(t.cpu().double() if t is not None and t.dtype.is_floating_point else t for t in given))


def kernel_of(name: str) -> Callable[..., torch.Tensor]:
    return getattr(importlib.import_module(f"fasttrace.kernels.{name}.launch"), name)


def launch(op: ModuleType, given, guarded) -> torch.Tensor:
    name = name_of(op)
    out = guarded((*given[0].shape[:2], given[1].shape[0] // PROJECTIONS[name]), given[0].dtype)
    return kernel_of(name)(*(t if t is None else guarded(t) for t in given), out=out, tile=TILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 7, 20, 21), (2, 16, 32, 32), (4, 5, 50, 36)], ids=str)
def test_matches_the_reference(op, shape, dtype, device, guarded, assert_close):
    given = inputs(op, *shape, dtype)
    assert_close(launch(op, given, guarded), truth(op, given), RATIO[dtype])


@pytest.mark.parametrize("absent", [2, 3], ids=["bias", "source"])
def test_what_is_optional_may_be_absent(op, absent, device, guarded, assert_close):
    given = inputs(op)
    given[absent] = None
    assert_close(launch(op, given, guarded), truth(op, given), 1e-6)


@pytest.mark.parametrize(("code", "read"), [(KEEP, True), (add_code(0), True), (ZERO, False), (slot_code(0, 3), False)])
def test_blocks_that_nobody_reads_are_zero_whatever_their_input(op, code, read, device, guarded):
    x, weight, bias, _ = inputs(op)
    source = torch.full((1, 1), code, dtype=torch.int32).expand(3, 7)
    if not read:
        x = torch.full_like(x, torch.nan)
    out = launch(op, [x, weight, bias, source.contiguous()], guarded)
    assert bool((out != 0).all() if read else (out == 0).all())


def test_an_mlp_in_two_kernels_reads_nothing_that_was_left_out(op, device, guarded, assert_close):
    x, weight, bias, source = inputs(op, seed=3)
    source[2] = KEEP
    source[:2][(source[:2] >= 0) & (source[:2] < 3)] = 2
    down, residual, bank = torch.randn(9, 21), torch.randn(3, 7, 9), torch.randn(2, 7, 9)
    hidden = launch(op, [x, weight, bias, source], guarded)
    out = kernel_of("linear_restore")(
        hidden, *(t if t is None else guarded(t) for t in (down, None, residual, source, bank)), tile=TILE
    )
    up = op.reference(*(t.double() for t in (x, weight, bias)))
    expected = linear_reference(up, down.double(), None, residual.double(), source, bank.double())
    assert_close(out, expected, 1e-6)


def test_an_empty_plan_launches_nothing(op, device, guarded):
    empty = torch.zeros(0, 4, dtype=torch.int32)
    assert launch(op, [*inputs(op, 0, 4)[:3], empty], guarded).shape == (0, 4, 21)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 64])
def test_every_config_at_true_shapes(op, rows, dtype, assert_close):
    given = [t.cuda() for t in inputs(op, rows, *TRUE_SHAPE[name_of(op)], dtype)]
    assert_close(getattr(op, name_of(op))(*given, implementation="triton"), op.reference(*given), 1e-2)


def test_the_reference_of_geglu_is_that_of_diffusers(assert_close):
    activations = pytest.importorskip("diffusers.models.activations")
    op = importlib.import_module("fasttrace.ops.geglu")
    x, weight, bias, _ = inputs(op)
    module = activations.GEGLU(20, 21)
    module.load_state_dict({"proj.weight": weight, "proj.bias": bias})
    assert_close(op.reference(x, weight, bias), module(x), 1e-6)


def test_the_reference_of_quick_gelu_is_the_formula(assert_close):
    op = importlib.import_module("fasttrace.ops.quick_gelu")
    x, weight, bias, _ = (t.double() for t in inputs(op))
    u = torch.einsum("bpk,fk->bpf", x, weight) + bias
    assert_close(op.reference(x, weight, bias), u / (1 + torch.exp(-1.702 * u)), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_gelu_up_by_tanh(dtype, device, guarded, assert_close):
    op = importlib.import_module("fasttrace.ops.gelu_up")
    given = inputs(op, dtype=dtype)
    given[0] *= 4  # where the tanh saturates too
    expected = op.reference(*(t.double() if t.dtype.is_floating_point else t for t in given), tanh=True)
    out = guarded((3, 7, 21), dtype)
    there = [guarded(t) for t in given]
    assert_close(kernel_of("gelu_up")(*there, tanh=True, out=out, tile=TILE), expected, RATIO[dtype])


@pytest.mark.parametrize("tanh", [True, False])
def test_the_reference_of_gelu_up_is_the_formula(tanh, assert_close):
    op = importlib.import_module("fasttrace.ops.gelu_up")
    x, weight, bias, _ = (t.double() for t in inputs(op))
    u = torch.einsum("bpk,fk->bpf", x, weight) + bias
    inner = torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)) if tanh else torch.erf(u / 2**0.5)
    assert_close(op.reference(x, weight, bias, tanh=tanh), u / 2 * (1 + inner), 1e-14)
    assert_close(op.gelu_up_torch(x, weight, bias, tanh=tanh), u / 2 * (1 + inner), 1e-14)


def test_the_torch_implementation_matches_too(op, assert_close):
    given = inputs(op)
    assert_close(getattr(op, f"{name_of(op)}_torch")(*given), truth(op, given), 1e-6)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_wrong_shapes_are_named(op, index):
    given = inputs(op)
    given[index] = given[index].new_zeros(2, 2)
    with pytest.raises(KernelError, match="expected"):
        getattr(op, name_of(op))(*given)


def test_registration_is_sound(op):
    torch.library.opcheck(getattr(torch.ops.fasttrace, name_of(op)).default, tuple(inputs(op)))
