"""Causal attention of packed suffixes over their base run's keys and values: all runs of a layer in one launch."""

import triton
import triton.language as tl


@triton.jit
def ragged_prefix_attention_kernel(
    out,  # [total, H, D], contiguous
    q,  # [total, H, D] at strides (s_q, D, 1)
    k,  # [total, H, D] at strides (s_k, D, 1)
    v,  # [total, H, D] at strides (s_v, D, 1)
    k_base,  # [G, T, H, D] at strides (s_kg, s_kt, D, 1)
    v_base,  # [G, T, H, D] at strides (s_vg, s_vt, D, 1)
    cu_seqlens,  # [N + 1]
    base,  # [N], contiguous, or None
    key_mask,  # [G, T] at strides (s_mg, s_mt), or None
    T,
    H,
    scale,  # factor on the scores, times log2(e)
    s_q,
    s_k,
    s_v,
    s_kg,
    s_kt,
    s_vg,
    s_vt,
    s_mg,
    s_mt,
    D: tl.constexpr,
    BD: tl.constexpr,  # D rounded up to a power of two
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: ``BM`` queries of one run and head. Grid ``(cdiv(T, BM) * H * N,)``, blocks of a head adjacent."""
    n_blocks = tl.cdiv(T, BM)
    block, head = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks % H
    run = tl.program_id(0) // (n_blocks * H)
    row = tl.load(cu_seqlens + run).to(tl.int64)
    n_live = (tl.load(cu_seqlens + run + 1) - row).to(tl.int32)
    if block * BM >= n_live:
        return

    start = T - n_live
    group = tl.zeros([], tl.int64) if base is None else tl.load(base + run).to(tl.int64)
    o_d, o_m = tl.arange(0, BD), block * BM + tl.arange(0, BM)
    m_m, m_d = (o_m < n_live)[:, None], (o_d < D)[None, :]
    b_q = tl.load(q + (row + o_m)[:, None] * s_q + head * D + o_d[None, :], mask=m_m & m_d, other=0.0)

    acc = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for first in range(0, tl.minimum(start + (block + 1) * BM, T), BN):
        o_n = first + tl.arange(0, BN)
        m_own, m_n = (o_n >= start)[:, None], (o_n < T)[:, None]
        o_own = (row + o_n - start)[:, None]
        p_k = tl.where(m_own, k + o_own * s_k, k_base + group * s_kg + o_n.to(tl.int64)[:, None] * s_kt)
        p_v = tl.where(m_own, v + o_own * s_v, v_base + group * s_vg + o_n.to(tl.int64)[:, None] * s_vt)
        b_k = tl.load(p_k + head * D + o_d[None, :], mask=m_n & m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BM, BN]
        m_s = o_n[None, :] <= (start + o_m)[:, None]
        if key_mask is not None:
            b_seen = tl.load(key_mask + group * s_mg + o_n.to(tl.int64) * s_mt, mask=o_n < T, other=0)
            m_s = m_s & (b_seen != 0)[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))

        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # no visible key so far
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_max, b_sum = b_new, b_sum * b_decay + tl.sum(b_p, 1)
        b_v = tl.load(p_v + head * D + o_d[None, :], mask=m_n & m_d, other=0.0)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * b_decay[:, None], input_precision="ieee")

    b_out = acc * tl.where(b_sum > 0, 1.0 / b_sum, 0.0)[:, None]
    tl.store(out + ((row + o_m) * H + head)[:, None] * D + o_d[None, :], b_out, mask=m_m & m_d)
