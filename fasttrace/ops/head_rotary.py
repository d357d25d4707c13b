"""Queries or keys as a transformer's attention reads them: each head normalised, then rotated by its position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Root-mean-square normalisation of heads (Zhang and Sennrich, 2019), rotary embedding (Su et al., 2021) of pairs.

    Args:
        x: queries or keys ``[B, P, H, d]``, any float dtype; ``d`` even.
        weight: ``[d]`` of the norm; ``None`` leaves heads as they are.
        cos, sin: fp32 ``[P, d / 2]``, the angles of a position; channels ``2 i`` and ``2 i + 1`` are a pair:
            ``(a cos - b sin, a sin + b cos)``. ``None`` for no rotation.
        eps: added to the mean square.

    Returns:
        ``[B, P, H, d]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_heads(x, weight, cos, sin)
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide)
    if weight is not None:
        value = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide)
    return _rotated(value, cos, sin).to(x.dtype).contiguous()


def head_rotary_torch(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The same by torch's own norm, the rotation in fp32."""
    check_heads(x, weight, cos, sin)
    value = x if weight is None else F.rms_norm(x, x.shape[3:], weight, eps)
    if cos is not None:
        value = _rotated(value.to(torch.promote_types(x.dtype, torch.float32)), cos, sin)
    return value.to(x.dtype).contiguous()


def _rotated(value: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return value
    first, second = value.reshape(*value.shape[:-1], -1, 2).unbind(-1)
    c, s = cos.to(value.dtype)[:, None], sin.to(value.dtype)[:, None]
    return torch.stack([first * c - second * s, first * s + second * c], -1).flatten(-2)


def check_heads(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if x.ndim != 4 or x.shape[3] % 2:
        raise KernelError(f"head_rotary: x {list(x.shape)}; expected [B, P, H, d] with an even d")
    if weight is not None and weight.shape != x.shape[3:]:
        raise KernelError(f"head_rotary: weight {list(weight.shape)}; expected [{x.shape[3]}]")
    expected = [x.shape[1], x.shape[3] // 2]
    for name, tensor, other in (("cos", cos, sin), ("sin", sin, cos)):
        if tensor is None and other is not None:
            raise KernelError(f"head_rotary: {name} is absent; give both cos and sin, each {expected}, or neither")
        if tensor is not None and list(tensor.shape) != expected:
            raise KernelError(f"head_rotary: {name} {list(tensor.shape)}; expected {expected}")


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def shape_class(x: Tensor, *_: object, **__: object) -> str:
    return f"hd{x.shape[3]}"


head_rotary = Op(
    "head_rotary",
    "(Tensor x, Tensor? weight=None, Tensor? cos=None, Tensor? sin=None, float eps=1e-6) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": head_rotary_torch, "triton": triton_launcher("head_rotary")},
    shape_class=shape_class,
)
