"""The way up of a UNet's MLP: two projections of one input, one gating the other, with nothing between written out."""

import triton
import triton.language as tl

from ..common import ZERO
from ..product import inner_end, load_inner
from ..restoring import is_read


@triton.jit
def geglu_kernel(
    x,  # [B, P, K] at strides (s_x_b, s_x_p, 1)
    weight,  # [2 F, K], contiguous: values, then gates
    bias,  # [2 F], or None
    source,  # [B, P] at strides (s_src_b, s_src_p), or None
    out,  # [B, P, F], contiguous
    B,
    P,
    s_x_b,
    s_x_p,
    s_src_b,
    s_src_p,
    F: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: ``BM`` of the ``B * P`` positions by ``BN`` channels. Grid ``(cdiv(B * P, BM) * cdiv(F, BN),)``."""
    tiles_n: tl.constexpr = (F + BN - 1) // BN
    o_m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)  # [BM]
    o_n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)  # [BN]
    m_m, m_n = o_m < B * P, o_n < F
    o_b, o_p = o_m // P, o_m % P
    m_read = m_m
    if source is not None:
        p_code = source + o_b.to(tl.int64) * s_src_b + o_p.to(tl.int64) * s_src_p
        m_read = is_read(tl.load(p_code, mask=m_m, other=ZERO), o_b, B)

    p_x = x + (o_b.to(tl.int64) * s_x_b + o_p.to(tl.int64) * s_x_p)[:, None]
    p_value = weight + (o_n.to(tl.int64) * K)[None, :]
    p_gate = p_value + F * K
    b_value = tl.zeros((BM, BN), tl.float32)
    b_gate = tl.zeros((BM, BN), tl.float32)
    for k in range(0, inner_end(m_read, K), BK):
        o_k = k + tl.arange(0, BK)
        b_x = load_inner(p_x, o_k, m_m, K, BK, True)  # [BM, BK]
        b_wv = load_inner(p_value, o_k, m_n, K, BK, False)  # [BK, BN]
        b_wg = load_inner(p_gate, o_k, m_n, K, BK, False)
        b_value = tl.dot(b_x, b_wv, b_value, input_precision="ieee")
        b_gate = tl.dot(b_x, b_wg, b_gate, input_precision="ieee")
    if bias is not None:
        b_value += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_gate += tl.load(bias + F + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    b_y = b_value * b_gate * 0.5 * (1.0 + tl.erf(b_gate * 0.7071067811865476))
    b_y = tl.where(m_read[:, None], b_y, 0.0)
    p_out = out + (o_m.to(tl.int64) * F)[:, None] + o_n[None, :]
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
