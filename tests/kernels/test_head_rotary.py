"""``head_rotary`` against the reference in float64, and the reference against diffusers' own rotation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttrace.errors import KernelError
from fasttrace.ops.head_rotary import head_rotary, head_rotary_torch, reference

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

RATIO = {torch.float32: 1e-6, torch.float16: 6e-4}
OPTIONS = [{}, {"norm": True}, {"rotary": True}, {"norm": True, "rotary": True}]


def inputs(rows=2, positions=5, heads=3, width=16, dtype=torch.float32, *, norm=False, rotary=False) -> list:
    g = torch.Generator().manual_seed(width)
    x = torch.randn(rows, positions, heads, width, generator=g).to(dtype)
    angles = torch.rand(positions, width // 2, generator=g) * 6
    weight = torch.randn(width, generator=g).to(dtype) if norm else None
    return [x, weight, *((angles.cos(), angles.sin()) if rotary else (None, None))]


def truth(given: list) -> torch.Tensor:
    return reference(*(t if t is None else t.cpu().double() for t in given))


def launch(given: list, guarded, **options) -> torch.Tensor:
    from fasttrace.kernels.head_rotary.launch import head_rotary as triton_head_rotary

    out = guarded(tuple(given[0].shape), given[0].dtype)
    x = guarded(given[0].flatten(2), gap=8).unflatten(2, given[0].shape[2:])
    return triton_head_rotary(x, *(t if t is None else guarded(t) for t in given[1:]), out=out, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 16), (2, 70, 2, 96)], ids=str)
def test_matches_the_reference(shape, dtype, options, device, guarded, assert_close):
    given = inputs(*shape, dtype, **options)
    assert_close(launch(given, guarded), truth(given), RATIO[dtype])


def test_an_empty_batch_launches_nothing(device, guarded):
    given = inputs(norm=True)
    assert launch([given[0][:0], *given[1:]], guarded).shape == (0, 5, 3, 16)


def test_what_the_kernel_does_not_take_is_refused(device):
    x = torch.zeros(1, 2, 2, 8, device=device)
    for wrong, why in ((x.double(), "float64"), (x.transpose(1, 2), "strides"), (x.new_zeros(1, 1, 1, 258), "258")):
        with pytest.raises(KernelError, match=why):
            head_rotary(wrong, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 24, 64), (1, 4608, 24, 128), (2, 1024, 24, 96)], ids=str)
def test_true_shapes(shape, dtype, assert_close):
    given = [t.cuda() for t in inputs(*shape, dtype, norm=True, rotary=True)]
    assert_close(head_rotary(*given, implementation="triton"), reference(*given), 1e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_torch_implementation_matches_too(options, assert_close):
    given = inputs(**options)
    assert_close(head_rotary_torch(*given), truth(given), 1e-6)


def test_the_reference_is_that_of_diffusers_and_torch(assert_close):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    x, weight, cos, sin = (t.double() for t in inputs(norm=True, rotary=True))
    assert_close(reference(x, weight), F.rms_norm(x, (16,), weight, 1e-6), 1e-12)
    pair = tuple(t.repeat_interleave(2, -1) for t in (cos, sin))
    expected = embeddings.apply_rotary_emb(x.transpose(1, 2), pair).transpose(1, 2)
    assert_close(reference(x, None, cos, sin), expected, 1e-6)


@pytest.mark.parametrize(
    ("index", "value", "name"),
    [
        (0, torch.zeros(2, 5, 3, 15), "x"),
        (1, torch.zeros(4), "weight"),
        (2, torch.zeros(5, 16), "cos"),
        (3, torch.zeros(4, 8), "sin"),
        (2, None, "cos"),
        (3, None, "sin"),
    ],
)
def test_wrong_shapes_are_named(index, value, name):
    given = inputs(norm=True, rotary=True)
    given[index] = value
    with pytest.raises(KernelError, match=rf"{name} .*(expected|give both)"):
        head_rotary(*given)


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.fasttrace.head_rotary.default, tuple(inputs(norm=True, rotary=True)))
