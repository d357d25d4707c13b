"""``W + A Bᵀ`` for many matrices at once: how an edit of rank r reaches the weights, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import KernelError

_BLOCK_BYTES = 4 << 20  # an fp32 block of rows that stays in a CPU's cache between its three uses


@torch.no_grad()
def rank_update(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> list[Tensor]:
    """Add a low-rank term to each of many matrices: ``W_i + A_i B_iᵀ``.

    Args:
        weights: ``W_i [N_i, K_i]``, each of its own shape; fp16, bf16, fp32 or fp64.
        left: ``A_i [N_i, r_i]``.
        right: ``B_i [K_i, r_i]``, both of ``W_i``'s dtype or a wider one, on its device.
        out: tensors like ``weights`` that receive the results.
        inplace: write the results over ``weights``.
        implementation: ``"reference"`` or ``"blocked"``; the fastest known one by default.

    Returns:
        The updated matrices: ``out``, ``weights``, or new tensors. Products are summed in fp32 (fp64 for fp64 weights)
        and rounded once.

    Raises:
        KernelError: lists of different lengths, shapes that do not fit each other, or ``out`` with ``inplace``.
    """
    _check(weights, left, right, out, inplace)
    if inplace:
        out = weights
    elif out is None:
        out = [torch.empty_like(w) for w in weights]
    apply = {None: _blocked, "blocked": _blocked, "reference": _reference}[implementation]
    for w, a, b, target in zip(weights, left, right, out, strict=True):
        apply(w, a, b, target)
    return list(out)


def reference(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``W + A Bᵀ`` of one matrix, computed in fp32 (fp64 for fp64 weights) and rounded to ``W``'s dtype once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + left.to(wide) @ right.to(wide).T).to(weight.dtype)


def _reference(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    out.copy_(reference(weight, left, right))


def _blocked(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """One read and one write of ``W``: BLAS adds onto it; half precision goes by fp32 blocks that stay in cache."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    if weight.dtype == wide:
        if out is not weight:
            out.copy_(weight)
        out.addmm_(left, right.T)
        return
    rows = max(1, _BLOCK_BYTES // max(1, weight.shape[1] * wide.itemsize))
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        out[block].copy_(weight[block].to(wide).addmm_(left[block], right.T))


def _check(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    out: Sequence[Tensor] | None,
    inplace: bool,
) -> None:
    if not len(weights) == len(left) == len(right):
        raise KernelError(
            f"rank_update: {len(weights)} weights, {len(left)} left and {len(right)} right factors; need one of each"
        )
    for i, (w, a, b) in enumerate(zip(weights, left, right, strict=True)):
        fits = w.ndim == a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]
        if not fits or (a.shape[0], b.shape[0]) != tuple(w.shape):
            raise KernelError(
                f"rank_update: matrix {i} has weight {list(w.shape)}, left {list(a.shape)}, right {list(b.shape)};"
                " expected [N, K], [N, r], [K, r]"
            )
    if out is None:
        return
    if inplace:
        raise KernelError("rank_update: give either out= or inplace=True, not both")
    for i, (w, target) in enumerate(zip(weights, out, strict=True)):
        if target.shape != w.shape or target.dtype != w.dtype or target.device != w.device:
            raise KernelError(
                f"rank_update: out[{i}] is {target.dtype} {list(target.shape)} on {target.device};"
                f" expected {w.dtype} {list(w.shape)} on {w.device}"
            )
