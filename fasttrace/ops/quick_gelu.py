"""CLIP's MLP up-projection: ``u * sigmoid(1.702 u)`` of ``u = x Wᵀ + b``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import Op, triton_launcher
from ._up import check_up, shape_class, zero_unread


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None) -> Tensor:
    """The sigmoid approximation of gelu (Hendrycks and Gimpel, "Gaussian error linear units", 2016) of a projection.

    Args:
        x: inputs ``[B, P, K]``, any float dtype.
        weight: ``[F, K]``.
        bias: ``[F]``.
        source: codes ``[B, P]`` of the MLP's value; positions that nothing reads are zero in the result.

    Returns:
        ``[B, P, F]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_up("quick_gelu", x, weight, bias, source, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    up = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return zero_unread((up * torch.sigmoid(1.702 * up)).to(x.dtype), source)


def quick_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None) -> Tensor:
    """The same in ``x``'s dtype, step by step. Positions that nothing reads are computed all the same, then zeroed."""
    check_up("quick_gelu", x, weight, bias, source, 1)
    up = F.linear(x, weight, bias)
    return zero_unread(up * torch.sigmoid(1.702 * up), source)


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


quick_gelu = Op(
    "quick_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? source=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": quick_gelu_torch, "triton": triton_launcher("quick_gelu")},
    shape_class=shape_class,
)
