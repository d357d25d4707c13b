"""A tile of a matrix product, shared by every kernel whose work is one: sums in fp32, unneeded tiles skipped."""

import triton
import triton.language as tl


@triton.jit
def load_inner(p, o_k, m, K: tl.constexpr, BK: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """A block along the inner dimension: ``[rows, BK]`` if ``ROWS_FIRST``, else ``[BK, columns]``; zero outside.

    ``p`` points at the first inner element of each row ``[rows, 1]`` or column ``[1, columns]``; ``m``: which exist.
    """
    if ROWS_FIRST:
        o, m_o, m_k = o_k[None, :], m[:, None], (o_k < K)[None, :]
    else:
        o, m_o, m_k = o_k[:, None], m[None, :], (o_k < K)[:, None]
    if K % BK == 0:
        return tl.load(p + o, mask=m_o, other=0.0)
    else:
        return tl.load(p + o, mask=m_o & m_k, other=0.0)


@triton.jit
def inner_end(m_needed, K: tl.constexpr):
    """End of the inner loop: ``K``, or 0 if no row of the tile is needed."""
    return tl.where(tl.max(m_needed.to(tl.int32), 0) > 0, K, 0)


@triton.jit
def product(p_x, p_w, m_m, m_n, m_needed, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``x Wᵀ`` of ``BM`` rows (at ``p_x [BM, 1]``) and ``BN`` weight rows (at ``p_w [1, BN]``): fp32 ``[BM, BN]``."""
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, inner_end(m_needed, K), BK):
        o_k = k + tl.arange(0, BK)
        b_x = load_inner(p_x, o_k, m_m, K, BK, True)
        b_w = load_inner(p_w, o_k, m_n, K, BK, False)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    return b_acc
