"""The UNet's gated MLP up-projection: ``(x Vᵀ + a) * gelu(x Gᵀ + b)``, where ``weight`` stacks V over G."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import Op, triton_launcher
from ._up import check_up, shape_class, zero_unread


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None) -> Tensor:
    """Value times gelu of the gate (Shazeer, "GLU variants improve transformer", 2020), with the exact gelu by erf.

    Args:
        x: inputs ``[B, P, K]``, any float dtype.
        weight: ``[2 F, K]``, the values' rows before the gates'.
        bias: ``[2 F]``.
        source: codes ``[B, P]`` of the MLP's value; positions that nothing reads are zero in the result.

    Returns:
        ``[B, P, F]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_up("geglu", x, weight, bias, source, 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    up = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    value, gate = up.chunk(2, -1)
    return zero_unread((value * F.gelu(gate)).to(x.dtype), source)


def geglu_torch(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None) -> Tensor:
    """The same in ``x``'s dtype, step by step. Positions that nothing reads are computed all the same, then zeroed."""
    check_up("geglu", x, weight, bias, source, 2)
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    return zero_unread(value * F.gelu(gate), source)


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0] // 2)


geglu = Op(
    "geglu",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? source=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": geglu_torch, "triton": triton_launcher("geglu")},
    shape_class=shape_class,
)
