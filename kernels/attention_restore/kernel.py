"""Flash attention of a patched batch: blocks that the projection overwrites cost nothing, heads are restored."""

import triton
import triton.language as tl

from ..common import ADD, KEEP, ZERO
from ..restoring import is_read


@triton.jit
def _accumulate(
    acc0,  # [BM, D0] fp32
    acc1,  # [BM, D1] fp32
    b_max,  # [BM] fp32, running maximum of the scaled scores
    b_sum,  # [BM] fp32
    b_q0,
    b_q1,
    p_k,
    p_v,
    s_kn,
    s_vn,
    o_m,
    first,
    last,
    n_keys,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys ``[first, last)``; ``MASKED`` if some may lie beyond the end or the diagonal."""
    o_d0, o_d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)
    for start in range(first, last, BN):
        o_n = start + tl.arange(0, BN)
        m_n0 = (o_d0 < D)[None, :]
        m_n1 = (o_d1 < D)[None, :]
        if MASKED:
            m_n0, m_n1 = m_n0 & (o_n < n_keys)[:, None], m_n1 & (o_n < n_keys)[:, None]
        p_kn = p_k + o_n.to(tl.int64)[:, None] * s_kn
        p_vn = p_v + o_n.to(tl.int64)[:, None] * s_vn
        b_k0 = tl.load(p_kn + o_d0[None, :], mask=m_n0, other=0.0)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")  # [BM, BN]
        if D1 > 0:
            b_k1 = tl.load(p_kn + o_d1[None, :], mask=m_n1, other=0.0)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
        b_s *= scale
        if MASKED:
            m_s = (o_n < n_keys)[None, :]
            if CAUSAL:
                m_s = m_s & (o_n[None, :] <= o_m[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_max, b_sum = b_new, b_sum * b_decay + tl.sum(b_p, 1)
        b_v0 = tl.load(p_vn + o_d0[None, :], mask=m_n0, other=0.0)
        b_p = b_p.to(b_v0.dtype)
        acc0 = tl.dot(b_p, b_v0, acc0 * b_decay[:, None], input_precision="ieee")
        if D1 > 0:
            b_v1 = tl.load(p_vn + o_d1[None, :], mask=m_n1, other=0.0)
            acc1 = tl.dot(b_p, b_v1, acc1 * b_decay[:, None], input_precision="ieee")
    return acc0, acc1, b_max, b_sum


@triton.jit
def _attend(
    q,
    k,
    v,
    more_k,
    more_v,
    kv_row,
    kv_length,
    row,
    head,
    o_m,
    M,
    N,
    L,
    s_qb,
    s_qm,
    s_kb,
    s_kn,
    s_vb,
    s_vn,
    s_mkb,
    s_mkn,
    s_mvb,
    s_mvn,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One block of queries of one row and head, over all its visible keys: fp32 ``[BM, D0]`` and ``[BM, D1]``.

    ``N = L = 0`` gives zeros: so do rows with no visible key, and blocks that nobody needs. The ``L`` keys of the
    second segment are all visible.
    """
    o_d0, o_d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 16)
    row_kv = row if kv_row is None else tl.load(kv_row + row).to(tl.int64)
    n_keys = N if kv_length is None else tl.minimum(N, tl.load(kv_length + row_kv))
    p_q = q + row * s_qb + o_m.to(tl.int64)[:, None] * s_qm + head * D
    p_k = k + row_kv * s_kb + head * D
    p_v = v + row_kv * s_vb + head * D
    m_m = (o_m < M)[:, None]
    b_q0 = tl.load(p_q + o_d0[None, :], mask=m_m & (o_d0 < D)[None, :], other=0.0)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = tl.load(p_q + o_d1[None, :], mask=m_m & (o_d1 < D)[None, :], other=0.0)

    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = tl.zeros([BM, D1 if D1 > 0 else 16], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    top = tl.min(o_m)
    last = tl.minimum(n_keys, top + BM) if CAUSAL else n_keys
    whole = tl.minimum(n_keys, top) // BN * BN if CAUSAL else n_keys // BN * BN
    acc0, acc1, b_max, b_sum = _accumulate(
        acc0, acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, s_kn, s_vn, o_m, 0, whole, n_keys, scale,
        D, D0, D1, BN, CAUSAL, False,
    )  # fmt: skip
    acc0, acc1, b_max, b_sum = _accumulate(
        acc0, acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, s_kn, s_vn, o_m, whole, last, n_keys, scale,
        D, D0, D1, BN, CAUSAL, True,
    )  # fmt: skip
    if more_k is not None:
        p_k, p_v = more_k + row_kv * s_mkb + head * D, more_v + row_kv * s_mvb + head * D
        acc0, acc1, b_max, b_sum = _accumulate(
            acc0, acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, s_mkn, s_mvn, o_m, 0, L // BN * BN, L, scale,
            D, D0, D1, BN, False, False,
        )  # fmt: skip
        acc0, acc1, b_max, b_sum = _accumulate(
            acc0, acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, s_mkn, s_mvn, o_m, L // BN * BN, L, L, scale,
            D, D0, D1, BN, False, True,
        )  # fmt: skip
    b_inverse = tl.where(b_sum > 0, 1.0 / b_sum, 0.0)[:, None]
    return acc0 * b_inverse, acc1 * b_inverse


@triton.jit
def _store(p_out, b_z0, b_z1, m_m, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    o_d0 = tl.arange(0, D0)
    tl.store(p_out + o_d0[None, :], b_z0, mask=m_m[:, None] & (o_d0 < D)[None, :])
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        tl.store(p_out + o_d1[None, :], b_z1, mask=m_m[:, None] & (o_d1 < D)[None, :])


@triton.jit
def _slots(
    bank, slot, m_slot, o_m, head, s_bs, s_bm, s_bh, D: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr
):
    """Columns from ``FIRST`` of the slots that ``m_slot`` selects, zero elsewhere: fp32, broadcastable to the block."""
    if bank is None or COLUMNS == 0:
        return tl.zeros([1, 1], tl.float32)
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_slot = bank + slot.to(tl.int64)[:, None] * s_bs + o_m.to(tl.int64)[:, None] * s_bm + head * s_bh + o_d[None, :]
    return tl.load(p_slot, mask=m_slot[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def attention_restore_kernel(
    out,  # [B, M, H, D], contiguous
    q,  # [B, M, H, D] at strides (s_qb, s_qm, D, 1)
    k,  # [Bk, N, H, D] at strides (s_kb, s_kn, D, 1)
    v,  # [Bk, N, H, D] at strides (s_vb, s_vn, D, 1)
    more_k,  # [Bk, L, H, D] at strides (s_mkb, s_mkn, D, 1), or None
    more_v,  # [Bk, L, H, D] at strides (s_mvb, s_mvn, D, 1), or None
    source,  # [B, M] at strides (s_sb, s_sm), or None
    head_source,  # [B, M, H] at strides (s_hb, s_hm, s_hh), or None
    bank,  # [S, M, H, D] at strides (s_bs, s_bm, s_bh, 1), or None
    kv_row,  # [B], contiguous, or None
    kv_length,  # [Bk], contiguous, or None
    B,
    M,
    N,
    L,
    H,
    scale,  # factor on the scores, times log2(e)
    s_qb,
    s_qm,
    s_kb,
    s_kn,
    s_vb,
    s_vn,
    s_mkb,
    s_mkn,
    s_mvb,
    s_mvn,
    s_sb,
    s_sm,
    s_hb,
    s_hm,
    s_hh,
    s_bs,
    s_bm,
    s_bh,
    D: tl.constexpr,  # head dimension, covered by D0 + D1 columns
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program: ``BM`` queries of one row and head. Grid ``(cdiv(M, BM) * H * B,)``, blocks of a head adjacent."""
    n_blocks = tl.cdiv(M, BM)
    block, head = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks % H
    row = (tl.program_id(0) // (n_blocks * H)).to(tl.int64)
    o_m = block * BM + tl.arange(0, BM)
    m_m = o_m < M
    m_needed = m_m
    if source is not None:
        b_code = tl.load(source + row * s_sb + o_m.to(tl.int64) * s_sm, mask=m_m, other=ZERO)
        m_needed = is_read(b_code, row.to(tl.int32), B)
    p_out = out + ((row * M + o_m) * H + head)[:, None] * D

    if head_source is None:
        keys, more = N, L
        if source is not None:
            needed = tl.max(m_needed.to(tl.int32))
            keys, more = N * needed, L * needed
        b_z0, b_z1 = _attend(
            q, k, v, more_k, more_v, kv_row, kv_length, row, head, o_m, M, keys, more, s_qb, s_qm, s_kb, s_kn,
            s_vb, s_vn, s_mkb, s_mkn, s_mvb, s_mvn, scale, D, D0, D1, BM, BN, CAUSAL,
        )  # fmt: skip
        if source is not None:
            b_z0, b_z1 = tl.where(m_needed[:, None], b_z0, 0.0), tl.where(m_needed[:, None], b_z1, 0.0)
        _store(p_out, b_z0, b_z1, m_m, D, D0, D1)
    else:
        p_code = head_source + row * s_hb + o_m.to(tl.int64) * s_hm + head * s_hh
        b_code = tl.load(p_code, mask=m_needed, other=ZERO)
        m_row = (b_code >= 0) & (b_code < B)
        m_attends = m_needed & (m_row | (b_code == KEEP) | (b_code <= ADD))
        m_added = m_needed & (b_code <= ADD)
        m_copied = m_needed & (b_code >= B)
        b_z0 = _slots(bank, b_code - B, m_copied, o_m, head, s_bs, s_bm, s_bh, D, 0, D0)
        b_z1 = _slots(bank, b_code - B, m_copied, o_m, head, s_bs, s_bm, s_bh, D, D0, D1)
        _store(p_out, b_z0, b_z1, m_m & (m_attends == 0), D, D0, D1)

        # A restored value is computed again from its source row's q, k and v, so that no program waits for another.
        # Positions are served row by row; there is one row unless the block is patched in part.
        b_row = tl.where(m_attends, tl.where(m_row, b_code, row.to(tl.int32)), -1)
        served = tl.max(b_row)
        while served >= 0:
            b_z0, b_z1 = _attend(
                q, k, v, more_k, more_v, kv_row, kv_length, served.to(tl.int64), head, o_m, M, N, L, s_qb, s_qm, s_kb,
                s_kn, s_vb, s_vn, s_mkb, s_mkn, s_mvb, s_mvn, scale, D, D0, D1, BM, BN, CAUSAL,
            )  # fmt: skip
            b_z0 += _slots(bank, -(b_code - ADD), m_added, o_m, head, s_bs, s_bm, s_bh, D, 0, D0)
            b_z1 += _slots(bank, -(b_code - ADD), m_added, o_m, head, s_bs, s_bm, s_bh, D, D0, D1)
            _store(p_out, b_z0, b_z1, b_row == served, D, D0, D1)
            b_row = tl.where(b_row == served, -1, b_row)
            served = tl.max(b_row)
