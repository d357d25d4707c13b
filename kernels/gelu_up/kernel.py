"""The way up of an MLP without a gate: a projection and its gelu, with nothing between written out."""

import triton
import triton.language as tl

from ..common import ZERO
from ..product import product
from ..restoring import is_read


@triton.jit
def _activated(b_u, FORM: tl.constexpr):
    """Gelu in fp32: by the error function, by its tanh approximation, or the sigmoid one of CLIP."""
    if FORM == "erf":
        return 0.5 * b_u * (1.0 + tl.erf(b_u * 0.7071067811865476))
    elif FORM == "tanh":  # 0.5 (1 + tanh z) is sigmoid(2 z)
        return b_u * tl.sigmoid(1.5957691216057308 * (b_u + 0.044715 * b_u * b_u * b_u))
    else:
        return b_u * tl.sigmoid(1.702 * b_u)


@triton.jit
def gelu_up_kernel(
    x,  # [B, P, K] at strides (s_x_b, s_x_p, 1)
    weight,  # [F, K], contiguous
    bias,  # [F], or None
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
    FORM: tl.constexpr,  # "erf", "tanh" or "quick"
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
    p_w = weight + (o_n.to(tl.int64) * K)[None, :]
    b_acc = product(p_x, p_w, m_m, m_n, m_read, K, BM, BN, BK)
    if bias is not None:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    b_y = tl.where(m_read[:, None], _activated(b_acc, FORM), 0.0)
    p_out = out + (o_m.to(tl.int64) * F)[:, None] + o_n[None, :]
    tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
