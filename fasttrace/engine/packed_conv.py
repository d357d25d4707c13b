"""Convolutions on a CPU whose weights are laid out once as oneDNN reads them, instead of in every call.

In a call of two rows, which is what following a trajectory takes, laying out the weights is a fifth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with a packed copy of its weight, which must be made by `pack` before and after any change."""

    packed: Tensor

    def pack(self) -> None:
        # What torch's own compiler calls when it freezes a model.
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.__dict__["packed"] = reorder(self.weight.detach().to_mkldnn(), *self._geometry())

    def forward(self, x: Tensor) -> Tensor:
        # A compiled graph takes the plain weight: packed ones cannot be its inputs.
        if torch.compiler.is_compiling() or not x.numel():
            return super().forward(x)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, *self._geometry(), "none", [], ""
        )
        return result

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        assert not isinstance(self.padding, str)
        return list(self.padding), list(self.stride), list(self.dilation), self.groups


def use_packed_weights(module: nn.Module) -> list[PackedConv2d]:
    """Turn every convolution inside a module that oneDNN computes into a `PackedConv2d`, in place, not yet packed."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return []
    packed = []
    for one in module.modules():
        if type(one) is nn.Conv2d and one.padding_mode == "zeros" and not isinstance(one.padding, str):
            weight = one.weight
            if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
                one.__class__ = PackedConv2d
                assert isinstance(one, PackedConv2d)
                packed.append(one)
    return packed
