"""A projection whose epilogue restores positions and adds the residual: attention's output, an MLP's way down."""

import triton
import triton.language as tl

from ..common import ZERO
from ..product import product
from ..restoring import add_noise, apply_slots, is_computed, source_row


@triton.jit
def linear_restore_kernel(
    x,  # [B, P, K] at strides (s_x_b, s_x_p, 1)
    weight,  # [N, K], contiguous
    bias,  # [N], or None
    gate,  # [B, N] at strides (s_gate_b, 1), or None
    residual,  # [B, P, N] at strides (s_res_b, s_res_p, 1), or None
    source,  # [B, P] at strides (s_src_b, s_src_p)
    bank,  # [S, P, N] at strides (s_bank_s, s_bank_p, 1), or None
    sigma,  # [B], contiguous, or None
    seed,  # [B], contiguous, or None
    noise_mask,  # [B, P] at strides (s_mask_b, s_mask_p), or None
    edit_x,  # [B, P, RANK], contiguous, or None
    edit_u,  # [B, N, RANK], contiguous, or None
    out,  # [B, P, N], contiguous
    B,
    P,
    s_x_b,
    s_x_p,
    s_gate_b,
    s_res_b,
    s_res_p,
    s_src_b,
    s_src_p,
    s_bank_s,
    s_bank_p,
    s_mask_b,
    s_mask_p,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """One program: ``BM`` of the ``B * P`` positions by ``BN`` channels. Grid ``(cdiv(B * P, BM) * cdiv(N, BN),)``."""
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    o_m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)  # [BM]
    first_n = tl.program_id(0) % tiles_n * BN
    o_n = first_n + tl.arange(0, BN)  # [BN]
    m_m, m_n = o_m < B * P, o_n < N
    o_b, o_p = o_m // P, o_m % P

    b_code = tl.load(source + o_b.to(tl.int64) * s_src_b + o_p.to(tl.int64) * s_src_p, mask=m_m, other=ZERO)
    m_computed = is_computed(b_code, B)
    b_row = source_row(b_code, o_b, B)  # [BM]
    p_x = x + (b_row.to(tl.int64) * s_x_b + o_p.to(tl.int64) * s_x_p)[:, None]
    p_w = weight + (o_n.to(tl.int64) * K)[None, :]

    b_acc = product(p_x, p_w, m_m, m_n, m_computed, K, BM, BN, BK)
    if bias is not None:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    if edit_x is not None:  # every source row among these positions has its own factors: one dot for each, in turn
        o_r = tl.arange(0, BR)
        row = tl.min(tl.where(m_computed, b_row, B), 0)
        while row < B:
            m_row = m_computed & (b_row == row)
            p_e = edit_x + (row.to(tl.int64) * P + o_p)[:, None] * RANK + o_r[None, :]
            p_u = edit_u + (row.to(tl.int64) * N + o_n)[None, :] * RANK + o_r[:, None]
            b_e = tl.load(p_e, mask=m_row[:, None] & (o_r < RANK)[None, :], other=0.0)  # [BM, BR]
            b_u = tl.load(p_u, mask=m_n[None, :] & (o_r < RANK)[:, None], other=0.0)  # [BR, BN]
            b_acc = tl.dot(b_e, b_u, b_acc, input_precision="ieee")
            row = tl.min(tl.where(m_computed & (b_row > row), b_row, B), 0)

    # The site's value has the storage dtype, as a hook would see it: a row and a slot that recorded it copy the same.
    b_v = b_acc.to(out.dtype.element_ty).to(tl.float32)
    b_v = apply_slots(b_v, b_code, B, bank, o_p, o_n, m_n, s_bank_s, s_bank_p)
    b_v = add_noise(b_v, m_m, sigma, seed, noise_mask, o_b, o_p, first_n, s_mask_b, s_mask_p, BN)
    m_mn = m_m[:, None] & m_n[None, :]
    if gate is not None:
        p_gate = gate + (o_b.to(tl.int64) * s_gate_b)[:, None] + o_n[None, :]
        b_v *= tl.load(p_gate, mask=m_mn, other=0.0).to(tl.float32)
    if residual is not None:
        p_res = residual + (o_b.to(tl.int64) * s_res_b + o_p.to(tl.int64) * s_res_p)[:, None] + o_n[None, :]
        b_v += tl.load(p_res, mask=m_mn, other=0.0).to(tl.float32)
    tl.store(out + (o_m.to(tl.int64) * N)[:, None] + o_n[None, :], b_v.to(out.dtype.element_ty), mask=m_mn)
