"""What follows a product or a convolution at a site, in one read of each input: restored, gated, added."""

import triton
import triton.language as tl

from ..common import ZERO
from ..restoring import add_noise, apply_slots, is_computed, source_row


@triton.jit
def epilogue_kernel(
    hidden,  # [B, P, C] at strides (s_hid_b, s_hid_p, 1)
    bias,  # [C], or None
    shortcut,  # [B, P, C] at strides (s_cut_b, s_cut_p, 1), or None
    source,  # [B, P] at strides (s_src_b, s_src_p)
    bank,  # [S, P, C] at strides (s_bank_s, s_bank_p, 1), or None
    sigma,  # [B], contiguous, or None
    seed,  # [B], contiguous, or None
    noise_mask,  # [B, P] at strides (s_mask_b, s_mask_p), or None
    gate,  # [B, C] at strides (s_gate_b, 1), or None
    residual,  # [B, P, C] at strides (s_res_b, s_res_p, 1), or None
    out,  # [B, P, C], contiguous
    inverse_scale,
    B,
    P,
    s_hid_b,
    s_hid_p,
    s_cut_b,
    s_cut_p,
    s_src_b,
    s_src_p,
    s_bank_s,
    s_bank_p,
    s_mask_b,
    s_mask_p,
    s_gate_b,
    s_res_b,
    s_res_p,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: ``BM`` of the ``B * P`` positions by ``BC`` channels. Grid ``(cdiv(B * P, BM) * cdiv(C, BC),)``."""
    tiles_c: tl.constexpr = (C + BC - 1) // BC
    o_m = tl.program_id(0) // tiles_c * BM + tl.arange(0, BM)  # [BM]
    first_c = tl.program_id(0) % tiles_c * BC
    o_c = first_c + tl.arange(0, BC)  # [BC]
    m_m, m_c = o_m < B * P, o_c < C
    o_b, o_p = o_m // P, o_m % P

    b_code = tl.load(source + o_b.to(tl.int64) * s_src_b + o_p.to(tl.int64) * s_src_p, mask=m_m, other=ZERO)
    m_load = is_computed(b_code, B)[:, None] & m_c[None, :]
    b_row, o_pos = source_row(b_code, o_b, B).to(tl.int64), o_p.to(tl.int64)
    p_hid = hidden + (b_row * s_hid_b + o_pos * s_hid_p)[:, None] + o_c[None, :]
    b_v = tl.load(p_hid, mask=m_load, other=0.0).to(tl.float32)
    if bias is not None:
        b_v += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if shortcut is not None:
        p_cut = shortcut + (b_row * s_cut_b + o_pos * s_cut_p)[:, None] + o_c[None, :]
        b_v += tl.load(p_cut, mask=m_load, other=0.0).to(tl.float32)

    b_v = (b_v * inverse_scale).to(out.dtype.element_ty).to(tl.float32)  # as a hook would see it
    b_v = apply_slots(b_v, b_code, B, bank, o_p, o_c, m_c, s_bank_s, s_bank_p)
    b_v = add_noise(b_v, m_m, sigma, seed, noise_mask, o_b, o_p, first_c, s_mask_b, s_mask_p, BC)
    m_mc = m_m[:, None] & m_c[None, :]
    if gate is not None:
        p_gate = gate + (o_b.to(tl.int64) * s_gate_b)[:, None] + o_c[None, :]
        b_v *= tl.load(p_gate, mask=m_mc, other=0.0).to(tl.float32)
    if residual is not None:
        p_res = residual + (o_b.to(tl.int64) * s_res_b + o_pos * s_res_p)[:, None] + o_c[None, :]
        b_v += tl.load(p_res, mask=m_mc, other=0.0).to(tl.float32)
    tl.store(out + (o_m.to(tl.int64) * C)[:, None] + o_c[None, :], b_v.to(out.dtype.element_ty), mask=m_mc)
