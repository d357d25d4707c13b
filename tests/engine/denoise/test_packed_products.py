"""Products on packed weights: equal to the plain layers, following edits, seen by counters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasttrace.engine.denoise.packed_products import forget, with_packed_products

DTYPES = [torch.float32, torch.bfloat16]


def is_near(layer: Any, packed: Tensor, sample: Tensor) -> bool:
    """Within the rounding of a few sums, which is relative to their terms: those may cancel."""
    plain, terms = layer(sample), copy.deepcopy(layer)
    for weight in terms.parameters():
        weight.abs_()
    return float((packed - plain).norm() / terms(sample.abs()).norm()) < 4 * torch.finfo(plain.dtype).eps


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_convolution_is_the_layer_itself(dtype: torch.dtype, data: st.DataObject) -> None:
    rows, groups, height, width = (data.draw(st.integers(1, most)) for most in (5, 3, 9, 9))
    size, stride, dilation, bias = (data.draw(st.integers(1, 3)), *(data.draw(st.integers(1, 2)) for _ in range(3)))
    inner, outer = (groups * data.draw(st.integers(1, 17)) for _ in range(2))
    padding = dilation * (size // 2) + max(0, dilation * (size - 1) + 1 - min(height, width))
    torch.manual_seed(rows)
    layer = nn.Conv2d(inner, outer, size, stride, padding, dilation, groups, bias == 1).to(dtype)
    layer = layer.requires_grad_(False).to(memory_format=torch.channels_last)
    sample = torch.randn(rows, inner, height, width, dtype=dtype)
    packed = with_packed_products(nn.Sequential(layer))(sample)
    assert packed.is_contiguous(memory_format=torch.channels_last)
    assert is_near(layer, packed, sample)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), inner=st.integers(1, 40), outer=st.integers(1, 40))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_linear_layer_is_the_layer_itself(
    dtype: torch.dtype, bias: bool, shape: list[int], inner: int, outer: int
) -> None:
    torch.manual_seed(inner)
    layer = nn.Linear(inner, outer, bias).to(dtype).requires_grad_(False)
    sample = torch.randn(*shape, inner, dtype=dtype)
    assert is_near(layer, with_packed_products(nn.Sequential(layer))(sample), sample)


def layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.Flatten(), nn.Linear(10 * 4 * 3, 7)).requires_grad_(False)
    return plain.to(memory_format=torch.channels_last), torch.randn(3, 6, 8, 5)


def test_edits_are_followed_and_the_plain_layers_left_alone() -> None:
    plain, sample = layers()
    packed = with_packed_products(plain)
    packed(sample)
    for module in (plain[0], plain[2]):
        module.weight.data.mul_(1.5)  # bypasses the version counter
        forget(plain)
        assert is_near(plain, packed(sample), sample)
    assert [type(module) for module in plain] == [nn.Conv2d, nn.Flatten, nn.Linear]


def test_counters_see_the_operations() -> None:
    plain, sample = layers()
    counts = []
    for module in (plain, with_packed_products(plain)):
        with FlopCounterMode(display=False) as counter:
            module(sample)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_layers_that_onednn_does_not_hold_stay_plain() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.Linear(2, 2).double())
    assert [type(module) for module in with_packed_products(plain)] == [nn.Conv2d, nn.Linear]
