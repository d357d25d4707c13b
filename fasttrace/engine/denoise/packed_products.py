"""Convolutions and linear layers of compiled calls on a CPU, on weights that oneDNN has laid out once a trace.

Without that every call lays them out again. The operators read the shadow's own weights, as graph inputs like any
other, and keep the laid-out copies beside them; `forget` drops those when a trace begins, so that an edit is followed,
and when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import conv_flop_count, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from .shadow import clone

_packed: Any = WeakTensorKeyDictionary()

_library: Any = torch.library.Library("fasttrace", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "packed_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor"
)
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def with_packed_products(unet: Any) -> Any:
    """A clone whose plain convolutions and linear layers are computed on packed weights, where oneDNN has them."""
    unet = clone(unet)
    for module in unet.modules():
        kind = _KINDS.get(type(module))
        if kind is not None and _is_packable(module):
            module.__class__ = kind
    return unet


def forget(unet: nn.Module) -> None:
    """Drop what was laid out of a UNet's weights: they may have been edited since."""
    for weight in unet.parameters():
        _packed.pop(weight, None)


class _Convolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        operator = torch.ops.fasttrace.packed_convolution.default
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = operator(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fasttrace.packed_linear.default(x.contiguous(), self.weight, self.bias)
        return y


_KINDS: dict[type, type] = {nn.Conv2d: _Convolution, nn.Linear: _Linear}


def _is_packable(module: Any) -> bool:
    weight = module.weight
    held = weight.dtype == torch.float32
    if weight.dtype == torch.bfloat16:
        held = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    plain = isinstance(module, nn.Linear) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))
    return held and plain and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _own(weight: Tensor, pack: Callable[[], Tensor]) -> Tensor:
    packed: Tensor | None = _packed.get(weight)
    if packed is None:
        packed = _packed[weight] = pack()
    return packed


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    how = padding, stride, dilation, groups
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    own = _own(weight, lambda: reorder(weight.to_mkldnn(), *how, x.shape))
    y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, own, bias, *how, "none", [], "")
    return y


def _fake_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    return functional.conv2d(x, weight, bias, *how).contiguous(memory_format=torch.channels_last)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own = _own(weight, lambda: torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1]))
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, own, bias, "none", [], "")
    return y


for _name, _run, _fake in (
    ("packed_convolution", _convolution, _fake_convolution),
    ("packed_linear", _linear, functional.linear),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"fasttrace::{_name}", _fake, lib=_library)


@register_flop_formula(torch.ops.fasttrace.packed_convolution)
def _convolution_flop(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = conv_flop_count(x, weight, out_shape)
    return count


@register_flop_formula(torch.ops.fasttrace.packed_linear)
def _linear_flop(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    rows = torch.Size(x).numel() // x[-1]
    return 2 * rows * weight[0] * weight[1]
