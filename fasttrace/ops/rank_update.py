"""``W + A Bᵀ`` for many matrices at once: how an edit of rank r reaches the weights, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ext import load_error
from ..errors import KernelError
from ._register import ImplementationError, Op, triton_launcher

MAX_KERNEL_RANK = 64  # above it the work is a matrix product's, and torch's is used
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
        right: ``B_i [K_i, r_i]``, both of ``W_i``'s dtype or fp32, on its device.
        out: tensors like ``weights`` that receive the results.
        inplace: write the results over ``weights``.
        implementation: ``"torch"``, ``"triton"``, ``"cuda"`` (csrc/, if it was built) or ``"reference"``; by default
            the fastest measured one.

    Returns:
        The updated matrices: ``out``, ``weights``, or new tensors. Products are summed in fp32 (fp64 for fp64 weights)
        and rounded once.

    Raises:
        KernelError: lists of different lengths, shapes that do not fit each other, ``out`` with ``inplace``, or an
            implementation that cannot serve these tensors.
    """
    check_update(weights, left, right, out, inplace)
    if inplace:
        out = weights
    elif out is None:
        out = [torch.empty_like(w) for w in weights]
    if implementation is None and any(a.shape[1] > MAX_KERNEL_RANK for a in left):
        implementation = "torch"
    update(weights, left, right, out, implementation=implementation)
    return list(out)


def reference(
    weights: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """``out_i = W_i + A_i B_iᵀ`` by its definition; ``out_i`` may be ``W_i``."""
    for w, a, b, target in zip(weights, left, right, out, strict=True):
        wide = torch.promote_types(w.dtype, torch.float32)
        target.copy_(w.to(wide) + a.to(wide) @ b.to(wide).T)


def update_torch(
    weights: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """One read and one write of ``W``: BLAS adds onto it; half precision goes by fp32 blocks that stay in cache."""
    for w, a, b, target in zip(weights, left, right, out, strict=True):
        wide = torch.promote_types(w.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        if w.dtype == wide:
            if target is not w:
                target.copy_(w)
            target.addmm_(a, b.T)
            continue
        rows = max(1, _BLOCK_BYTES // max(1, w.shape[1] * wide.itemsize))
        buffer = w.new_empty(min(rows, w.shape[0]), w.shape[1], dtype=wide)
        for start in range(0, w.shape[0], rows):
            block = slice(start, start + rows)
            sums = buffer[: w.shape[0] - start]
            target[block].copy_(sums.copy_(w[block]).addmm_(a[block], b.T))


def update_triton(
    weights: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """The Triton kernel: all matrices in one launch."""
    _launch(weights, left, right, out)
    _mark_written(out)


def update_cuda(
    weights: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """The CUDA kernel of csrc/: 48 matrices a launch, and nothing copied to the device first."""
    error = load_error()
    if error:
        raise ImplementationError(f"rank_update: {error}; or choose another implementation of the op", lasting=True)
    left, right = [a.float().contiguous() for a in left], [b.float().contiguous() for b in right]
    try:
        torch.ops.fasttrace_ext.rank_update(out, weights, left, right)
    except RuntimeError as failure:
        raise ImplementationError(f"rank_update: {failure}; or choose another implementation of the op") from failure
    _mark_written(out)


def check_update(
    weights: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    out: Sequence[Tensor] | None,
    inplace: bool,
) -> None:
    """Raise a ``KernelError`` for lists and shapes that do not fit together."""
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
        if not w.device == a.device == b.device:
            raise KernelError(
                f"rank_update: matrix {i} has its weight on {w.device}, its factors on {a.device} and {b.device};"
                f" move the factors to {w.device}"
            )
    if out is None:
        return
    if inplace:
        raise KernelError("rank_update: give either out= or inplace=True, not both")
    if len(out) != len(weights):
        raise KernelError(f"rank_update: {len(out)} outputs for {len(weights)} weights; need one of each")
    for i, (w, target) in enumerate(zip(weights, out, strict=True)):
        if target.shape != w.shape or target.dtype != w.dtype or target.device != w.device:
            raise KernelError(
                f"rank_update: out[{i}] is {target.dtype} {list(target.shape)} on {target.device};"
                f" expected {w.dtype} {list(w.shape)} on {w.device}"
            )


def _mark_written(out: Sequence[Tensor]) -> None:
    """Raise the version of tensors that a kernel wrote to, so that what was derived from them is seen to be stale."""
    torch.autograd.graph.increment_version([t for t in out if not t.is_inference()])


def _fake(*_: object) -> None:
    return None


def shape_class(weights: Sequence[Tensor], left: Sequence[Tensor], *_: object) -> str:
    ranks = max((a.shape[1] for a in left), default=0)
    return f"{'one' if len(weights) == 1 else 'many'}_r{next(r for r in (1, 4, 16, 64, 1 << 30) if ranks <= r)}"


_launch = triton_launcher("rank_update")

update = Op(
    "rank_update",
    "(Tensor[] weights, Tensor[] left, Tensor[] right, Tensor(a!)[] out) -> ()",
    reference=reference,
    fake=_fake,
    implementations={"torch": update_torch, "triton": update_triton, "cuda": update_cuda},
    shape_class=shape_class,
    writes=3,
)
