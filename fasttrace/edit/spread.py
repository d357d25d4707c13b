"""An edit spread over several text layers, each of which takes an equal share of what is still missing.

After MEMIT (Meng et al., arXiv 2210.07229), with a target that needs no optimisation: the hidden state ``z`` that the
last edited layer has at the new subject. Layer by layer, the keys ``K`` and the hidden state ``h`` at the old subject
are computed under the shares already given, and the layer's residual is ``R = (z − h) / layers left``. A text layer
adds its MLP's and its attention's output to the hidden state, so that a share reaches the last layer whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from ..errors import EditError
from ..prompts import Prompt
from ..sites import part_sites
from .concepts import Pair, Positions
from .keys import text_columns, tokens_of
from .matrices import Matrix
from .ridge import Prior, fold, ridge_right
from .update import Applied, Update


def fit_spread(
    pipe: Any,
    pairs: Sequence[Pair],
    preserve: Sequence[Prompt],
    matrices: Sequence[Matrix],
    priors: Mapping[str, Prior],
    positions: Positions,
) -> list[Update]:
    """One update for each matrix, fitted in execution order, each on top of the ones before; the weights are put back.

    Raises:
        EditError: a matrix whose output is not added to the hidden state.
    """
    inner = [matrix.name for matrix in matrices if not matrix.into_hidden]
    if inner:
        raise EditError(f"{inner[0]} does not write to the hidden state: spread over mlp or self_attn sites")
    updates: list[Update] = []
    for part, group in groupby(matrices, key=lambda matrix: matrix.part):
        updates += _spread_over(getattr(pipe, part), part, list(group), pipe, pairs, preserve, priors, positions)
    return updates


def _spread_over(
    encoder: Any,
    part: str,
    matrices: list[Matrix],
    pipe: Any,
    pairs: Sequence[Pair],
    preserve: Sequence[Prompt],
    priors: Mapping[str, Prior],
    positions: Positions,
) -> list[Update]:
    request = tokens_of(pipe, part, pairs, preserve, positions)
    top = max(matrix.site.layer for matrix in matrices)
    last = next(site for site in part_sites(encoder, part) if site.kind == "hidden" and site.layer == top)
    hidden = {last.name: last.module}
    target = text_columns(encoder, request.new, {}, hidden)[last.name]
    updates: list[Update] = []
    applied: list[Applied] = []
    try:
        for done, matrix in enumerate(matrices):
            module = {matrix.name: matrix.module}
            seen = text_columns(encoder, request.old, module, hidden)
            kept = text_columns(encoder, request.keep, module)[matrix.name]
            wide = torch.promote_types(matrix.weight.dtype, torch.float32)
            residual = (target - seen[last.name]).to(wide) / (len(matrices) - done)
            right = ridge_right(seen[matrix.name], priors[matrix.name], kept)
            updates.append(Update(matrix.name, *fold(residual, right)))
            applied.append(Applied([matrix], updates[-1:]))
    finally:
        for one in reversed(applied):
            one.revert()
    return updates
