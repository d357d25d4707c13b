"""``layer_norm`` against the reference in float64, and the reference against torch's norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttrace.errors import KernelError
from fasttrace.ops.layer_norm import layer_norm, layer_norm_torch, reference

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}
OPTIONS = [
    {},
    {"affine": True},
    {"shift": True},
    {"scale": True},
    {"shift": True, "scale": True},
    {"affine": True, "shift": True, "scale": True, "rms": True},
    {"rms": True},
]


def inputs(
    rows=2, positions=5, channels=24, dtype=torch.float32, *, affine=False, shift=False, scale=False, rms=False
) -> dict:
    g = torch.Generator().manual_seed(rows + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "x": normal(rows, positions, channels) + 0.5,
        "weight": normal(channels) if affine else None,
        "bias": normal(channels) if affine else None,
        "shift": normal(rows, channels) if shift else None,
        "scale": normal(rows, channels) if scale else None,
        "eps": 1e-6,
        "rms": rms,
    }


def mapped(given: dict, function) -> dict:
    return {n: function(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}


def truth(given: dict) -> torch.Tensor:
    return reference(**mapped(given, lambda t: t.cpu().double()))


def launch(given: dict, guarded, **options) -> torch.Tensor:
    from fasttrace.kernels.layer_norm.launch import layer_norm as triton_layer_norm

    return triton_layer_norm(**given, out=guarded(tuple(given["x"].shape), given["x"].dtype), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 24), (3, 130, 33)], ids=str)
def test_matches_the_reference(shape, dtype, options, device, guarded, assert_close):
    given = inputs(*shape, dtype, **options)
    assert_close(launch(mapped(given, guarded), guarded), truth(given), RATIO[dtype])


def test_a_large_mean_does_not_drown_the_variance(device, guarded, assert_close):
    given = inputs()
    given["x"] += 1000.0
    assert_close(launch(mapped(given, guarded), guarded), truth(given), 1e-4)


def test_modulation_may_lie_apart_or_be_shared(device, guarded, assert_close):
    given = inputs(shift=True, scale=True)
    there = mapped(given, guarded)
    modulation = guarded(torch.cat([given["shift"], given["scale"]], 1))  # one projection's halves
    there |= {"shift": modulation[:, :24], "scale": modulation[:, 24:]}
    assert_close(launch(there, guarded), truth(given), 1e-6)
    for each, put in ((given, lambda t: t), (there, guarded)):
        each |= {"scale": put(given["scale"][:1].clone()).expand(2, 24)}
    assert_close(launch(there, guarded), truth(given), 1e-6)


def test_a_row_does_not_depend_on_its_batch_mates(device, guarded):
    given = inputs(rows=3, positions=7, shift=True, scale=True)
    whole = launch(mapped(given, guarded), guarded)
    alone = {n: v[1:2] if n in ("x", "shift", "scale") else v for n, v in given.items()}
    assert torch.equal(launch(mapped(alone, guarded), guarded)[0], whole[1])


def test_an_empty_batch_launches_nothing(device, guarded):
    assert launch(mapped(inputs(rows=0), guarded), guarded).shape == (0, 5, 24)


def test_what_the_kernel_does_not_take_is_refused(device):
    with pytest.raises(KernelError, match="float64"):
        layer_norm(torch.zeros(1, 1, 8, dtype=torch.float64, device=device), implementation="triton")
    with pytest.raises(KernelError, match="8200 channels"):
        layer_norm(torch.zeros(1, 1, 8200, device=device), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 320), (16, 64, 1280), (3, 1024, 3072), (1, 5, 8192)], ids=str)
def test_true_shapes(shape, dtype, assert_close):
    given = mapped(inputs(*shape, dtype, affine=True, shift=True, scale=True), torch.Tensor.cuda)
    assert_close(layer_norm(*given.values(), implementation="triton"), reference(**given), 1e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_torch_implementation_matches_too(options, assert_close):
    given = inputs(**options)
    assert_close(layer_norm_torch(**given), truth(given), 1e-6)


def test_the_reference_is_that_of_torch(assert_close):
    given = mapped(inputs(affine=True), torch.Tensor.double)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    assert_close(reference(x, weight, bias, eps=1e-6), F.layer_norm(x, (24,), weight, bias, 1e-6), 1e-12)
    assert_close(reference(x, weight, eps=1e-6, rms=True), F.rms_norm(x, (24,), weight, 1e-6), 1e-12)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "shift", "scale"])
def test_wrong_shapes_are_named(name):
    given = inputs(affine=True, shift=True, scale=True)
    given[name] = torch.zeros(7)
    with pytest.raises(KernelError, match=f"{name} .*expected"):
        layer_norm(*given.values())


def test_registration_is_sound():
    given = inputs(affine=True, shift=True, scale=True)
    torch.library.opcheck(torch.ops.fasttrace.layer_norm.default, tuple(given.values()))
