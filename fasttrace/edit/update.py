"""Low-rank updates of named matrices, and how they reach a pipeline's weights and leave them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import EditError
from ..ops.rank_update import rank_update
from .matrices import Matrix, list_matrices


@dataclass(frozen=True, eq=False)
class Update:
    """``W' = W + left rightᵀ`` of one matrix.

    Attributes:
        name: the matrix, such as ``text_encoder.encoder.layers.0.self_attn.out_proj``.
        left: ``[N, r]`` float32 (float64 for a float64 model).
        right: ``[K, r]``, float32 or float64; matrices that share keys share the tensor.
    """

    name: str
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


# The contents that a weight had before each edit that is applied to it now, first edit first.
_kept: Any = WeakTensorKeyDictionary()


class Applied:
    """Updates that are in a pipeline's weights; `revert` brings back exactly the bits that were there before."""

    def __init__(self, matrices: Sequence[Matrix], updates: Sequence[Update]) -> None:
        self._weights = [matrix.weight for matrix in matrices]
        self._before = [weight.detach().clone() for weight in self._weights]
        for weight, before in zip(self._weights, self._before, strict=True):
            _kept.setdefault(weight, []).append(before)
        try:
            add_updates(self._weights, updates)
        except BaseException:
            self.revert()
            raise

    @torch.no_grad()
    def revert(self) -> None:
        """Undo the updates; a second call does nothing.

        Raises:
            EditError: a later edit of the same matrix is still applied.
        """
        pairs = list(zip(self._weights, self._before, strict=True))
        if any(_kept[weight][-1] is not before for weight, before in pairs):
            raise EditError("a later edit of the same matrix is still applied: revert the last one first")
        for weight, before in pairs:
            weight.copy_(before)
            _kept[weight].pop()
            if not _kept[weight]:
                del _kept[weight]
        self._weights, self._before = [], []


@torch.no_grad()
def add_updates(weights: Sequence[Tensor], updates: Sequence[Update]) -> None:
    """``W += left rightᵀ`` in place for many matrices; a factor that several share is moved to their device once."""
    wide = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
    moved: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def shared(factor: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        key = (id(factor), weight.device, dtype)
        if key not in moved:
            moved[key] = factor.to(weight.device, dtype)
        return moved[key]

    left = [shared(u.left, w, dtype) for u, w, dtype in zip(updates, weights, wide, strict=True)]
    right = [shared(u.right, w, dtype) for u, w, dtype in zip(updates, weights, wide, strict=True)]
    rank_update([weight.detach() for weight in weights], left, right, inplace=True)


def unedited(weight: Tensor) -> Tensor:
    """The weight as it was before any edit that is applied now."""
    before = _kept.get(weight)
    return before[0] if before else weight


def matrices_of(pipe: Any, updates: Sequence[Update]) -> list[Matrix]:
    """The pipeline's matrices that the updates name.

    Raises:
        EditError: a matrix that the pipeline lacks, or that has another shape.
    """
    by_name = {matrix.name: matrix for matrix in list_matrices(pipe)}
    for update in updates:
        shape = (update.left.shape[0], update.right.shape[0])
        if update.name not in by_name:
            raise EditError(f"this edit is for another model: {type(pipe).__name__} has no {update.name}")
        found = tuple(by_name[update.name].weight.shape)
        if found != shape:
            raise EditError(
                f"this edit is for another model: {update.name} is {list(found)} here and the edit's is {list(shape)}"
            )
    return [by_name[update.name] for update in updates]
