"""RECE: after an edit, find the text state that would still bring the old concept back, and edit that away too.

Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models" (arXiv 2407.12383). The state
``c'`` that makes the edited matrices answer as the original ones did to ``c`` minimises ``Σ ‖Wₙ c' − W₀ c‖² + μ ‖c'‖²``
over all matrices. As ``Wₙ = W₀ M`` for every matrix, both sums need only the Gram matrix ``G = Σ W₀ᵀ W₀``, computed
once: ``c' = (Mᵀ G M + μ I)⁻¹ Mᵀ G c``, whatever the number of matrices or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompt
from .concepts import Pair, Positions
from .cross_attention import multiplied, state_keys
from .matrices import Matrix
from .ridge import Prior, ridge_right
from .update import Update

_SHRINK = 1e-3  # μ, relative to the mean eigenvalue of G


def fit_rece(
    pipe: Any,
    pairs: Sequence[Pair],
    preserve: Sequence[Prompt],
    matrices: Sequence[Matrix],
    prior: Prior,
    positions: Positions,
    rounds: int = 3,
) -> list[Update]:
    """UCE's edit, then ``rounds`` times: every old key's adversarial state becomes a further key of a joint refit."""
    old, new, kept = (columns.to("cpu", torch.float64) for columns in state_keys(pipe, pairs, preserve, positions))
    gram = weight_gram(matrices)
    keys, targets = old, new
    for _ in range(rounds):
        right = ridge_right(keys, prior, kept)
        adversarial = adversarial_states(gram, targets - keys, right, old)
        keys, targets = torch.cat([keys, adversarial], dim=1), torch.cat([targets, new], dim=1)
    return multiplied(matrices, targets - keys, ridge_right(keys, prior, kept))


def weight_gram(matrices: Sequence[Matrix]) -> Tensor:
    """``Σ W₀ᵀ W₀ [D, D]``, products in float32 or wider, sum in float64."""
    total = torch.zeros((matrices[0].weight.shape[1],) * 2, dtype=torch.float64)
    for matrix in matrices:
        weight = matrix.weight.detach().to(torch.promote_types(matrix.weight.dtype, torch.float32))
        total += (weight.T @ weight).to("cpu", torch.float64)
    return total


def adversarial_states(gram: Tensor, key_change: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """``c' [D, r]``: what the edited matrices read as the original ones read ``old``; all float64 on the CPU."""
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    multiplier = eye + key_change @ right.T
    system = multiplier.T @ gram @ multiplier + _SHRINK * gram.trace() / gram.shape[0] * eye
    return torch.linalg.solve(system, multiplier.T @ (gram @ old))
