"""``group_norm_silu`` against the reference in float64, and the reference against torch's group_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttrace.errors import KernelError
from fasttrace.ops.group_norm_silu import group_norm_silu, norm_torch, reference

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")

RATIO = {torch.float32: 2e-6, torch.float16: 6e-4}


def inputs(rows=2, positions=70, channels=48, groups=8, dtype=torch.float32, *, mean=0.0, seed=0) -> list:
    g = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(rows, positions, channels, generator=g) * (1 + torch.rand(channels, generator=g))
    weight, bias = torch.randn(channels, generator=g), torch.randn(channels, generator=g)
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), groups]


def truth(given, **options) -> torch.Tensor:
    return reference(*(t.cpu().double() if isinstance(t, torch.Tensor) else t for t in given), **options)


def launch(given, guarded, **options) -> torch.Tensor:
    from fasttrace.kernels.group_norm_silu.launch import group_norm_silu as triton_group_norm_silu

    out = guarded(tuple(given[0].shape), given[0].dtype)
    there = [guarded(t) if isinstance(t, torch.Tensor) else t for t in given]
    return triton_group_norm_silu(*there, **options, out=out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("rows", "positions", "channels", "groups"),
    [(1, 1, 8, 4), (2, 70, 48, 8), (3, 33, 60, 20), (1, 1100, 16, 2), (2, 64, 320, 32), (1, 5, 7, 1)],
)
def test_matches_the_reference(rows, positions, channels, groups, dtype, device, guarded, assert_close):
    given = inputs(rows, positions, channels, groups, dtype)
    assert_close(launch(given, guarded), truth(given), RATIO[dtype])


def test_without_silu(device, guarded, assert_close):
    given = inputs()
    assert_close(launch(given, guarded, silu=False), truth(given, silu=False), 2e-6)


@pytest.mark.parametrize("shape", [(2, 70, 48, 8), (3, 1100, 16, 2)], ids=str)
def test_a_shift_of_each_row_is_added_first(shape, device, guarded, assert_close):
    given = inputs(*shape)
    shift = 5.0 + torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(9))
    expected = truth([given[0] + shift[:, None], *given[1:]])
    assert_close(truth(given, shift=shift.double()), expected, 1e-6)
    wide = guarded(torch.cat([shift, torch.full_like(shift, torch.nan)], 1))
    for lying in (guarded(shift), wide[:, : shape[2]]):
        assert_close(launch(given, guarded, shift=lying), expected, 2e-6)


def test_a_large_mean_does_not_drown_the_variance(device, guarded, assert_close):
    given = inputs(mean=1000.0)
    assert_close(launch(given, guarded, silu=False), truth(given, silu=False), 1e-4)


def test_a_constant_group_is_its_bias(device, guarded):
    given = inputs()
    given[0][:] = 3.25
    out = launch(given, guarded, silu=False).cpu()
    assert torch.equal(out, given[2].expand_as(out))


def test_eps_is_inside_the_root(device, guarded, assert_close):
    given = inputs()
    given[0] *= 0.01
    assert_close(launch(given, guarded, eps=0.5), truth(given, eps=0.5), 2e-6)


def test_a_row_does_not_depend_on_its_batch_mates(device, guarded):
    given = inputs(rows=3)
    whole = launch(given, guarded)
    assert torch.equal(launch([given[0][1:2], *given[1:]], guarded)[0], whole[1])


def test_a_channels_last_value_is_taken_as_it_lies(device, assert_close):
    given = inputs(2, 12, 16, 4)
    spatial = given[0].transpose(1, 2).reshape(2, 16, 3, 4).contiguous(memory_format=torch.channels_last).to(device)
    view = spatial.flatten(2).transpose(1, 2)
    assert view.stride(-1) == 1
    there = [view, *(t.to(device) for t in given[1:3]), 4]
    assert_close(group_norm_silu(*there, implementation="triton"), truth(given), 2e-6)


def test_an_empty_batch_launches_nothing(device, guarded):
    given = inputs()
    assert launch([given[0][:0], *given[1:]], guarded).shape == (0, 70, 48)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 320), (3, 64, 2560), (1, 16384, 960)], ids=str)
def test_true_shapes(shape, dtype, assert_close):
    given = [t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs(*shape, 32, dtype)]
    assert_close(group_norm_silu(*given, implementation="triton"), reference(*given), 1e-2)


@pytest.mark.parametrize("silu", [True, False])
def test_the_reference_is_that_of_torch(silu, assert_close):
    x, weight, bias, groups = (t.double() if isinstance(t, torch.Tensor) else t for t in inputs(mean=2.0))
    expected = F.group_norm(x.transpose(1, 2), groups, weight, bias, 1e-6).transpose(1, 2)
    expected = F.silu(expected) if silu else expected
    assert_close(reference(x, weight, bias, groups, 1e-6, silu), expected, 1e-12)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_the_torch_implementation_matches_too(silu, shifted, assert_close):
    given = inputs()
    shift = torch.randn(2, 48, generator=torch.Generator().manual_seed(9)) if shifted else None
    assert_close(norm_torch(*given, silu=silu, shift=shift), truth(given, silu=silu, shift=shift), 1e-6)


@pytest.mark.parametrize(("index", "value"), [(0, torch.zeros(2, 3)), (1, torch.zeros(3)), (2, torch.zeros(3)), (3, 7)])
def test_wrong_shapes_are_named(index, value):
    given = inputs()
    given[index] = value
    with pytest.raises(KernelError, match="expected"):
        group_norm_silu(*given)


def test_a_shift_of_a_wrong_shape_is_named():
    with pytest.raises(KernelError, match=r"shift \[48\]; expected \[2, 48\]"):
        group_norm_silu(*inputs(), shift=torch.zeros(48))


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.fasttrace.group_norm_silu.default, (*inputs(), 1e-5, True, torch.ones(2, 48)))
