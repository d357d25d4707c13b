"""Heads normalised and rotated in one read and one write."""

import triton
import triton.language as tl


@triton.jit
def head_rotary_kernel(
    x,  # [B, P, H, D] at strides (s_x_b, s_x_p, D, 1)
    weight,  # [D], or None
    cos,  # fp32 [P, D / 2], contiguous, or None
    sin,  # fp32 [P, D / 2], contiguous, or None
    out,  # [B, P, H, D], contiguous
    total,  # B * P * H
    P,
    H,
    eps,
    s_x_b,
    s_x_p,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,  # a power of two, at least D
):
    """One program: ``BM`` of the ``B * P * H`` heads. Grid ``(cdiv(B * P * H, BM),)``."""
    o_m, o_d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m = (o_m < total)[:, None] & (o_d < D)[None, :]
    o_t = o_m // H
    o_b, o_p, o_h = (o_t // P).to(tl.int64), o_t % P, o_m % H
    p_x = x + (o_b * s_x_b + o_p.to(tl.int64) * s_x_p + o_h * D)[:, None] + o_d[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    if weight is not None:
        b_x /= tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_x *= tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        b_a, b_b = tl.split(tl.reshape(b_x, (BM, BD // 2, 2)))  # [BM, BD / 2], channels 2 i and 2 i + 1
        o_i = tl.arange(0, BD // 2)
        m_i = (o_m < total)[:, None] & (o_i < D // 2)[None, :]
        o_angle = (o_p * (D // 2))[:, None] + o_i[None, :]
        b_cos, b_sin = tl.load(cos + o_angle, mask=m_i, other=0.0), tl.load(sin + o_angle, mask=m_i, other=0.0)
        b_x = tl.interleave(b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos)
    tl.store(out + (o_m.to(tl.int64) * D)[:, None] + o_d[None, :], b_x.to(out.dtype.element_ty), mask=m)
