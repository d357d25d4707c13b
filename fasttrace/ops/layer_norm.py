"""Layer normalisation with a transformer's modulation: what stands before every attention and MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with ``norm(x) = (x - mean) / sqrt(variance + eps) * weight + bias``.

    Layer normalisation is Ba, Kiros and Hinton's (2016), without the mean Zhang and Sennrich's (2019); the modulation
    by row is Peebles and Xie's, "Scalable diffusion models with transformers" (2023).

    Args:
        x: ``[B, P, C]``, any float dtype.
        weight, bias: ``[C]``, of a norm that has them.
        shift, scale: ``[B, C]``, each row's own; from its time and pooled text.
        eps: added to the variance.
        rms: leave the mean out: divide by the root of the mean square.

    Returns:
        ``[B, P, C]``, dtype of ``x``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_layer_norm(x, weight, bias, shift, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide)
    if not rms:
        value = value - value.mean(-1, keepdim=True)
    value = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    value = value if weight is None else value * weight.to(wide)
    value = value if bias is None else value + bias.to(wide)
    value = value if scale is None else value * (1 + scale.to(wide)[:, None])
    value = value if shift is None else value + shift.to(wide)[:, None]
    return value.to(x.dtype).contiguous()


def layer_norm_torch(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """The same by torch's norms, with the modulation after them."""
    check_layer_norm(x, weight, bias, shift, scale)
    if rms:
        value = F.rms_norm(x, x.shape[2:], weight, eps)
        value = value if bias is None else value + bias
    else:
        value = F.layer_norm(x, x.shape[2:], weight, bias, eps)
    if scale is not None and shift is not None:
        return torch.addcmul(shift[:, None], value, 1 + scale[:, None])
    value = value if scale is None else value * (1 + scale[:, None])
    return (value if shift is None else value + shift[:, None]).contiguous()


def check_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if x.ndim != 3:
        raise KernelError(f"layer_norm: x {list(x.shape)}; expected [B, P, C]")
    rows, _, channels = x.shape
    for name, tensor, shape in (
        ("weight", weight, [channels]),
        ("bias", bias, [channels]),
        ("shift", shift, [rows, channels]),
        ("scale", scale, [rows, channels]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise KernelError(f"layer_norm: {name} {list(tensor.shape)}; expected {shape}; expand what rows share")


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def shape_class(x: Tensor, *_: object, **__: object) -> str:
    return f"c{x.shape[-1]}_{'few' if x.shape[:-1].numel() < 4096 else 'many'}"


layer_norm = Op(
    "layer_norm",
    "(Tensor x, Tensor? weight=None, Tensor? bias=None, Tensor? shift=None, Tensor? scale=None, float eps=1e-5,"
    " bool rms=False) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": layer_norm_torch, "triton": triton_launcher("layer_norm")},
    shape_class=shape_class,
)
