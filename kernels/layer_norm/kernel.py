"""Layer normalisation and its modulation in one read and one write: a position's channels stay in registers."""

import triton
import triton.language as tl


@triton.jit
def layer_norm_kernel(
    x,  # [B, P, C] at strides (s_x_b, s_x_p, 1)
    weight,  # [C], or None
    bias,  # [C], or None
    shift,  # [B, C] at strides (s_shift_b, 1), or None
    scale,  # [B, C] at strides (s_scale_b, 1), or None
    out,  # [B, P, C], contiguous
    B,
    P,
    eps,
    s_x_b,
    s_x_p,
    s_shift_b,
    s_scale_b,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,  # a power of two, at least C
    RMS: tl.constexpr,
):
    """One program: ``BM`` of the ``B * P`` positions, all channels. Grid ``(cdiv(B * P, BM),)``."""
    o_m, o_c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    m_c = o_c < C
    m = (o_m < B * P)[:, None] & m_c[None, :]
    o_b, o_p = (o_m // P).to(tl.int64), (o_m % P).to(tl.int64)
    b_x = tl.load(x + (o_b * s_x_b + o_p * s_x_p)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if not RMS:
        b_x = tl.where(m, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    b_y = b_x / tl.sqrt(tl.sum(b_x * b_x, 1) / C + eps)[:, None]
    if weight is not None:
        b_y *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        b_y *= 1.0 + tl.load(scale + (o_b * s_scale_b)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if shift is not None:
        b_y += tl.load(shift + (o_b * s_shift_b)[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(out + (o_m.to(tl.int64) * C)[:, None] + o_c[None, :], b_y.to(out.dtype.element_ty), mask=m)
