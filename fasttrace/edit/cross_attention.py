"""Edits of cross-attention: TIME, UCE's replace mode and LocoEdit, as one shared low-rank multiplier.

Every ``to_k`` and ``to_v`` of the UNet reads the same text states, without a bias, and the target is the original
matrix applied to another state, so all of them become ``W₀ M`` with ``M = I + (K* − K) Bᵀ``: one small solve for ``B``,
and one skinny product ``W₀ (K* − K)`` a matrix. The three methods differ in tokens, matrices and ridge (``METHODS``).

TIME: Orgad et al., arXiv 2303.08084. UCE: Gandikota et al., arXiv 2308.14761. LocoEdit: Basu et al., arXiv 2405.01008.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import EditError
from ..prompts import Prompt
from .concepts import Pair, Positions
from .keys import state_columns, tokens_of
from .matrices import Matrix
from .quickfix import moved_values
from .ridge import Prior, fold, ridge_right
from .update import Update


def fit_cross_attention(
    pipe: Any,
    pairs: Sequence[Pair],
    preserve: Sequence[Prompt],
    matrices: Sequence[Matrix],
    prior: Prior,
    positions: Positions,
) -> list[Update]:
    """One update for each matrix; all share the right factor.

    Args:
        pairs: old and new sentences.
        preserve: sentences whose subjects keep their values.
        matrices: ``to_k`` and ``to_v`` projections of cross-attention.
        prior: ``λ`` and ``C``, shared since the keys are.
    """
    old, new, kept = state_keys(pipe, pairs, preserve, positions)
    return multiplied(matrices, new - old, ridge_right(old, prior, kept))


def state_keys(
    pipe: Any, pairs: Sequence[Pair], preserve: Sequence[Prompt], positions: Positions
) -> tuple[Tensor, Tensor, Tensor]:
    """Text states ``[D, r]`` at the old subjects, at the new ones in the same order, and at those to preserve.

    Raises:
        EditError: the UNet projects the text states before cross-attention, or the spans do not align.
    """
    if getattr(pipe.unet.config, "encoder_hid_dim_type", None) is not None:
        raise EditError(
            f"the UNet's encoder_hid_dim_type={pipe.unet.config.encoder_hid_dim_type!r} changes the text states before "
            "cross-attention: only UNets that read them as they are can be edited"
        )
    request = tokens_of(pipe, "text_encoder", pairs, preserve, positions)
    old = state_columns(pipe, [pair.old.text for pair in pairs], request.old.positions)
    new = state_columns(pipe, [pair.new.text for pair in pairs], request.new.positions)
    kept = state_columns(pipe, [prompt.text for prompt in preserve], request.keep.positions)
    return old, new, kept


def multiplied(matrices: Sequence[Matrix], key_change: Tensor, right: Tensor) -> list[Update]:
    """``W₀ M`` for many matrices: the multiplier stays as its factors ``key_change [D, r]`` and ``right [D, r]``."""
    change, narrow = fold(key_change.to("cpu", right.dtype), right)
    return [Update(matrix.name, moved_values(matrix, change), narrow) for matrix in matrices]
