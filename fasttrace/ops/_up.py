"""What the two MLP up-projections share: which positions anyone reads, and the check of shapes.

``source`` is the source map of the *MLP's* value, after the way down. A position whose value comes from elsewhere (a
row, a slot, zero) feeds nothing, since the way down gathers the source row's inputs; its result here is zero, and
blocks of such positions cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from .attention_restore import is_read


def zero_unread(value: Tensor, source: Tensor | None) -> Tensor:
    """Zero positions of ``value [B, P, F]`` that nothing reads."""
    if source is None:
        return value
    return torch.where(is_read(source)[..., None], value, 0)


def check_up(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, parts: int) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together; ``weight`` has a multiple of ``parts`` rows."""
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] % parts:
        rows = "F" if parts == 1 else f"{parts} F"
        raise KernelError(f"{op}: x {list(x.shape)}, weight {list(weight.shape)}; expected [B, P, K] and [{rows}, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"{op}: bias {list(bias.shape)}; expected [{weight.shape[0]}], one for each row of weight")
    if source is not None and source.shape != x.shape[:2]:
        raise KernelError(f"{op}: source {list(source.shape)}; expected {list(x.shape[:2])}; expand what rows share")


def shape_class(x: Tensor, weight: Tensor, *_: object, **__: object) -> str:
    """Class of a call's shapes, for the selection table."""
    few = "few" if x.shape[:-1].numel() < 1024 else "many"
    return f"n{weight.shape[0]}_k{weight.shape[1]}_{few}"
