"""An MLP's up-projection without a gate: ``gelu(x Wᵀ + b)``, OpenCLIP's exact or transformers' by tanh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import Op, triton_launcher
from ._up import check_up, shape_class, zero_unread


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None, tanh: bool = False
) -> Tensor:
    """Gelu (Hendrycks and Gimpel, "Gaussian error linear units", 2016) of a projection.

    Args:
        x: inputs ``[B, P, K]``, any float dtype.
        weight: ``[F, K]``.
        bias: ``[F]``.
        source: codes ``[B, P]`` of the MLP's value; positions that nothing reads are zero in the result.
        tanh: the approximation ``u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u³)))`` instead of the error function.

    Returns:
        ``[B, P, F]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_up("gelu_up", x, weight, bias, source, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    up = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return zero_unread(F.gelu(up, approximate=_form(tanh)).to(x.dtype), source)


def gelu_up_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None, tanh: bool = False
) -> Tensor:
    """The same in ``x``'s dtype, step by step. Positions that nothing reads are computed all the same, then zeroed."""
    check_up("gelu_up", x, weight, bias, source, 1)
    return zero_unread(F.gelu(F.linear(x, weight, bias), approximate=_form(tanh)), source)


def _form(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


gelu_up = Op(
    "gelu_up",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? source=None, bool tanh=False) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": gelu_up_torch, "triton": triton_launcher("gelu_up")},
    shape_class=shape_class,
)
