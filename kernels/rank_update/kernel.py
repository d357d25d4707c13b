"""``W + A Bᵀ`` for many matrices of different shapes in one launch: one read and one write of every ``W``."""

import triton
import triton.language as tl


@triton.jit
def rank_update_kernel(
    table,  # int64 [14, M], contiguous: see launch.FIELDS
    weight_type,  # any pointer of the weights' type
    factor_type,  # any pointer of the factors' type
    M,
    BT: tl.constexpr,  # a power of two, at least M
    ALIGNED: tl.constexpr,  # weights and outputs start, and go on from row to row, at multiples of 16 elements
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: a tile of ``BM`` rows by ``BN`` columns of one matrix. The grid counts the tiles of all of them."""
    o_t = tl.arange(0, BT)
    first_tiles = tl.load(table + 13 * M + o_t, mask=o_t < M, other=1 << 62)  # [BT]
    i = tl.sum((first_tiles <= tl.program_id(0)).to(tl.int32), 0) - 1
    tile = tl.program_id(0) - tl.load(table + 13 * M + i)

    weight = tl.load(table + i).to(weight_type.dtype)
    out = tl.load(table + M + i).to(weight_type.dtype)
    left = tl.load(table + 2 * M + i).to(factor_type.dtype)
    right = tl.load(table + 3 * M + i).to(factor_type.dtype)
    rows = tl.load(table + 4 * M + i)
    columns = tl.load(table + 5 * M + i)
    rank = tl.load(table + 6 * M + i).to(tl.int32)
    s_weight = tl.load(table + 7 * M + i)
    s_out = tl.load(table + 8 * M + i)
    s_left_n = tl.load(table + 9 * M + i)
    s_left_r = tl.load(table + 10 * M + i)
    s_right_k = tl.load(table + 11 * M + i)
    s_right_r = tl.load(table + 12 * M + i)
    if ALIGNED:
        weight, out = tl.multiple_of(weight, 16), tl.multiple_of(out, 16)
        s_weight, s_out, columns = tl.multiple_of(s_weight, 16), tl.multiple_of(s_out, 16), tl.multiple_of(columns, 16)

    tiles_n = tl.cdiv(columns, BN)
    o_n = tile // tiles_n * BM + tl.arange(0, BM)  # [BM]
    o_k = tile % tiles_n * BN + tl.arange(0, BN)  # [BN]
    m_n, m_k = o_n < rows, o_k < columns
    m_nk = m_n[:, None] & m_k[None, :]
    b_w = tl.load(weight + (o_n * s_weight)[:, None] + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)
    p_left, p_right = left + o_n * s_left_n, right + o_k * s_right_k
    for j in tl.range(0, rank, loop_unroll_factor=4):
        b_a = tl.load(p_left + j * s_left_r, mask=m_n, other=0.0).to(tl.float32)
        b_b = tl.load(p_right + j * s_right_r, mask=m_k, other=0.0).to(tl.float32)
        b_w += b_a[:, None] * b_b[None, :]
    tl.store(out + (o_n * s_out)[:, None] + o_k[None, :], b_w.to(out.dtype.element_ty), mask=m_nk)
