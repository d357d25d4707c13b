"""Diff-QuickFix: one projection of the text encoder takes, at the old subject, the value it has at the new subject.

Basu et al., "Localizing and Editing Knowledge in Text-to-Image Generative Models" (arXiv 2310.13730). With ``k``
the projection's input at the old subject and ``k*`` its input at the new one, the target is ``v = W₀ k*``, so that the
residual of the ridge problem is ``W₀ (k* − k)``: no cancellation. The released code adds the projection's bias to
``v``, which the layer then adds again; ``with_bias`` reproduces that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompt
from .concepts import Pair, Positions
from .keys import text_columns, tokens_of
from .matrices import Matrix
from .ridge import Prior, fold, ridge_right
from .update import Update


def fit_quickfix(
    pipe: Any,
    pairs: Sequence[Pair],
    preserve: Sequence[Prompt],
    matrices: Sequence[Matrix],
    priors: Mapping[str, Prior],
    positions: Positions,
    *,
    with_bias: bool,
) -> list[Update]:
    """One update for each matrix, each fitted for itself on the unedited model.

    Args:
        pairs: old and new sentences.
        preserve: sentences whose subjects keep their values.
        matrices: projections of text encoders.
        priors: by name of the matrix.
        with_bias: values as the released code takes them.
    """
    updates = []
    for part, group in groupby(matrices, key=lambda matrix: matrix.part):
        members = list(group)
        encoder, modules = getattr(pipe, part), {matrix.name: matrix.module for matrix in members}
        request = tokens_of(pipe, part, pairs, preserve, positions)
        old = text_columns(encoder, request.old, modules)
        new = text_columns(encoder, request.new, modules)
        kept = text_columns(encoder, request.keep, modules)
        for matrix in members:
            name = matrix.name
            right = ridge_right(old[name], priors[name], kept[name])
            shift = matrix.bias if with_bias else None
            updates.append(Update(name, *fold(moved_values(matrix, new[name] - old[name], shift), right)))
    return updates


@torch.no_grad()
def moved_values(matrix: Matrix, key_change: Tensor, shift: Tensor | None = None) -> Tensor:
    """``W₀ (K* − K) + shift``: ``[N, r]`` in float32 or wider, on the matrix's device."""
    weight = matrix.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = weight.to(wide) @ key_change.to(weight.device, wide)
    return change if shift is None else change + shift.detach().to(wide)[:, None]
