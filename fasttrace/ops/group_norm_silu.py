"""Group normalisation, then SiLU, of channels-last values: what stands before every convolution of a resnet.

``shift`` is what a resnet adds to its hidden value before the second norm, a vector a row: the time embedding, with the
first convolution's bias in it where that ran without, so that neither is a pass of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """``silu((y - mean) / sqrt(variance + eps) * weight + bias)`` (Wu and He, "Group normalization", 2018).

    ``y`` is ``x + shift``. Mean and (biased) variance are those of a row's group: ``C / groups`` adjacent channels at
    all its positions.

    Args:
        x: ``[B, P, C]``, any float dtype; a spatial value in channels-last memory has such a view.
        weight, bias: ``[C]``.
        groups: divides ``C``.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: ``[B, C]``, added to every position of its row before anything else.

    Returns:
        ``[B, P, C]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_norm(x, weight, bias, groups, shift)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, positions, channels = x.shape
    value = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)[:, None]
    grouped = value.reshape(rows, positions, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdim=True)
    variance = (grouped - mean).square().mean((1, 3), keepdim=True)
    normal = ((grouped - mean) * (variance + eps).rsqrt()).reshape(x.shape) * weight.to(wide) + bias.to(wide)
    return (normal * torch.sigmoid(normal) if silu else normal).to(x.dtype)


def norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """The same by torch's ``group_norm`` of the channels-first view."""
    check_norm(x, weight, bias, groups, shift)
    value = x if shift is None else x + shift[:, None]
    normal = F.group_norm(value.transpose(1, 2), groups, weight, bias, eps)
    return (F.silu(normal) if silu else normal).transpose(1, 2).contiguous()


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if x.ndim != 3 or groups < 1 or x.shape[2] % groups:
        raise KernelError(
            f"group_norm_silu: x {list(x.shape)}, groups={groups}; expected [B, P, C], C divisible by groups"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[2:]:
            raise KernelError(f"group_norm_silu: {name} {list(tensor.shape)}; expected [{x.shape[2]}]")
    if shift is not None and shift.shape != (x.shape[0], x.shape[2]):
        raise KernelError(
            f"group_norm_silu: shift {list(shift.shape)}; expected {[x.shape[0], x.shape[2]]}; expand what rows share"
        )


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def shape_class(x: Tensor, *_: object, **__: object) -> str:
    return f"p{x.shape[-2]}_c{x.shape[-1]}"


group_norm_silu = Op(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True, Tensor? shift=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": norm_torch, "triton": triton_launcher("group_norm_silu")},
    shape_class=shape_class,
)
