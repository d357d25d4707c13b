"""Group normalisation, then SiLU, of channels-last values: what stands before every convolution of a resnet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True) -> Tensor:
    """``silu((x - mean) / sqrt(variance + eps) * weight + bias)`` (Wu and He, "Group normalization", 2018).

    Mean and (biased) variance are those of a row's group: ``C / groups`` adjacent channels at all its positions.

    Args:
        x: ``[B, P, C]``, any float dtype; a spatial value in channels-last memory has such a view.
        weight, bias: ``[C]``.
        groups: divides ``C``.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        ``[B, P, C]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_norm(x, weight, bias, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, positions, channels = x.shape
    grouped = x.to(wide).reshape(rows, positions, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdim=True)
    variance = (grouped - mean).square().mean((1, 3), keepdim=True)
    normal = ((grouped - mean) * (variance + eps).rsqrt()).reshape(x.shape) * weight.to(wide) + bias.to(wide)
    return (normal * torch.sigmoid(normal) if silu else normal).to(x.dtype)


def norm_torch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True) -> Tensor:
    """The same by torch's ``group_norm`` of the channels-first view."""
    check_norm(x, weight, bias, groups)
    normal = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps)
    return (F.silu(normal) if silu else normal).transpose(1, 2).contiguous()


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if x.ndim != 3 or groups < 1 or x.shape[2] % groups:
        raise KernelError(
            f"group_norm_silu: x {list(x.shape)}, groups={groups}; expected [B, P, C], C divisible by groups"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[2:]:
            raise KernelError(f"group_norm_silu: {name} {list(tensor.shape)}; expected [{x.shape[2]}]")


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def shape_class(x: Tensor, *_: object, **__: object) -> str:
    return f"p{x.shape[-2]}_c{x.shape[-1]}"


group_norm_silu = Op(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": norm_torch, "triton": triton_launcher("group_norm_silu")},
    shape_class=shape_class,
)
