"""A resnet's shortcut addition, whose result is a site's value: ``restore((shortcut + hidden + b) / s) + noise``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher
from .linear_restore import noised, noised_torch
from .restore import restore


def reference(
    hidden: Tensor,
    shortcut: Tensor,
    source: Tensor,
    bank: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    output_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The addition by its definition. A spatial value in channels-last memory has a view ``[B, h w, C]``.

    Args:
        hidden: result of the second convolution, ``[B, P, C]``, any float dtype.
        shortcut: the resnet's input, projected or not, ``[B, P, C]``.
        source: codes ``[B, P]``, as in ``fasttrace.ops.restore``.
        bank: ``[S, P, C]`` values that codes name.
        noise: ``(sigma [B] fp32, seed [B] int64, mask [B, P] bool)``, as in ``fasttrace.ops.linear_restore``.
        output_scale: diffusers' ``output_scale_factor``, which divides the sum.
        bias: ``[C]``, of the second convolution and of the shortcut's together, where they were run without theirs: a
            convolution's own bias is a pass of its own over its result.

    Returns:
        ``[B, P, C]``, dtype of ``hidden``, contiguous.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_residual(hidden, shortcut, source, bank, noise, bias)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = shortcut.to(wide) + hidden.to(wide)
    if bias is not None:
        total += bias.to(wide)
    value = (total / output_scale).to(hidden.dtype)
    return noised(restore(value, source, bank), noise).contiguous()


def residual_torch(
    hidden: Tensor,
    shortcut: Tensor,
    source: Tensor,
    bank: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    output_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in the storage dtype, with copies after it."""
    check_residual(hidden, shortcut, source, bank, noise, bias)
    value = shortcut + (hidden if bias is None else hidden + bias)
    value = value if output_scale == 1.0 else value / output_scale
    return noised_torch(restore(value, source, bank), noise).contiguous()


def check_residual(
    hidden: Tensor,
    shortcut: Tensor,
    source: Tensor,
    bank: Tensor | None,
    noise: Sequence[Tensor] | None,
    bias: Tensor | None,
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if hidden.ndim != 3 or shortcut.shape != hidden.shape:
        raise KernelError(
            f"residual_restore: hidden {list(hidden.shape)}, shortcut {list(shortcut.shape)}; expected [B, P, C] twice"
        )
    rows, positions, channels = hidden.shape
    named = [("source", source, [rows, positions])]
    if bias is not None:
        named.append(("bias", bias, [channels]))
    if bank is not None:
        named.append(("bank", bank, [bank.shape[0], positions, channels]))
    if noise is not None:
        named += zip(("sigma", "seed", "mask"), noise, ([rows], [rows], [rows, positions]), strict=True)
    for name, tensor, shape in named:
        if list(tensor.shape) != shape:
            raise KernelError(
                f"residual_restore: {name} {list(tensor.shape)}; expected {shape}; expand what rows share"
            )


def _fake(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


def shape_class(hidden: Tensor, *_: object, **__: object) -> str:
    return f"c{hidden.shape[-1]}"


residual_restore = Op(
    "residual_restore",
    "(Tensor hidden, Tensor shortcut, Tensor source, Tensor? bank=None, Tensor[]? noise=None, float output_scale=1.0,"
    " Tensor? bias=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": residual_torch, "triton": triton_launcher("residual_restore", "epilogue")},
    shape_class=shape_class,
)
