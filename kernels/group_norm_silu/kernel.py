"""Group normalisation and SiLU of channels-last values, in two stages: statistics of chunks, then everything else."""

import triton
import triton.language as tl


@triton.jit
def _members(WIDTH: tl.constexpr, CPG: tl.constexpr, GT: tl.constexpr, BC: tl.constexpr):
    """Which of a tile's channels ``[1, BC]`` belong to which of its groups ``[GT, 1]``."""
    o_c = tl.arange(0, BC)[None, :]
    return (o_c // CPG == tl.arange(0, GT)[:, None]) & (o_c < WIDTH)


@triton.jit
def group_norm_silu_stats_kernel(
    x,  # [B, P, C] at strides (s_x_b, s_x_p, 1)
    shift,  # [B, C] at strides (s_shift_b, 1), added to x, or None
    partial,  # fp32 [2, B, CHUNKS, G], contiguous: mean, and sum of squared differences from it
    P,
    s_x_b,
    s_x_p,
    s_shift_b,
    C: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    GT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: ``ROWS`` positions of one row, ``GT`` groups. Grid ``(chunks, cdiv(G, GT), B)``."""
    CPG: tl.constexpr = C // G
    WIDTH: tl.constexpr = GT * CPG
    first, row = tl.program_id(0) * ROWS, tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * WIDTH + tl.arange(0, BC)  # [BC]
    m_c = (tl.arange(0, BC) < WIDTH) & (o_c < C)
    count = tl.minimum(P - first, ROWS)
    p_x = x + row * s_x_b + o_c

    # Differences from the chunk's first position: squares of what is left do not cancel when a mean is large.
    b_shift = tl.load(p_x + first.to(tl.int64) * s_x_p, mask=m_c, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BP, BC), tl.float32)
    b_square = tl.zeros((BP, BC), tl.float32)
    for start in range(0, ROWS, BP):
        o_p = start + tl.arange(0, BP)
        m = (o_p < count)[:, None] & m_c[None, :]
        b_x = tl.load(p_x[None, :] + ((first + o_p).to(tl.int64) * s_x_p)[:, None], mask=m, other=0.0).to(tl.float32)
        b_d = tl.where(m, b_x - b_shift[None, :], 0.0)
        b_sum += b_d
        b_square += b_d * b_d

    b_s = tl.sum(b_sum, 0)
    b_mean = b_shift + b_s / count  # [BC], each channel's
    if shift is not None:
        b_mean += tl.load(shift + row * s_shift_b + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_m2 = tl.sum(b_square, 0) - b_s * b_s / count
    m_member = _members(WIDTH, CPG, GT, BC)
    b_group = tl.sum(tl.where(m_member, b_mean[None, :], 0.0), 1) / CPG  # [GT]
    b_off = tl.where(m_member, b_mean[None, :] - b_group[:, None], 0.0)
    b_m2_group = tl.sum(tl.where(m_member, b_m2[None, :], 0.0), 1) + count * tl.sum(b_off * b_off, 1)

    o_g = tl.program_id(1) * GT + tl.arange(0, GT)
    chunks = tl.num_programs(0)
    p_partial = partial + (row * chunks + tl.program_id(0)) * G + o_g
    tl.store(p_partial, b_group, mask=o_g < G)
    tl.store(p_partial + tl.num_programs(2).to(tl.int64) * chunks * G, b_m2_group, mask=o_g < G)


@triton.jit
def group_norm_silu_kernel(
    x,  # [B, P, C] at strides (s_x_b, s_x_p, 1)
    shift,  # [B, C] at strides (s_shift_b, 1), added to x, or None
    partial,  # fp32 [2, B, CHUNKS, G], contiguous, from the first stage
    weight,  # [C]
    bias,  # [C]
    out,  # [B, P, C], contiguous
    P,
    eps,
    s_x_b,
    s_x_p,
    s_shift_b,
    C: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    GT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two, at least the number of chunks
    SILU: tl.constexpr,
):
    """One program: ``ROWS`` positions of one row, ``GT`` groups. Grid ``(chunks, cdiv(G, GT), B)``."""
    CPG: tl.constexpr = C // G
    WIDTH: tl.constexpr = GT * CPG
    first, row = tl.program_id(0) * ROWS, tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)

    # Chan, Golub and LeVeque: a group's mean and squares from those of its chunks.
    o_g, o_chunk = tl.program_id(1) * GT + tl.arange(0, GT), tl.arange(0, CHUNKS)
    m_partial = (o_chunk < chunks)[:, None] & (o_g < G)[None, :]
    p_partial = partial + (row * chunks + o_chunk)[:, None] * G + o_g[None, :]
    b_means = tl.load(p_partial, mask=m_partial, other=0.0)  # [CHUNKS, GT]
    b_m2s = tl.load(p_partial + tl.num_programs(2).to(tl.int64) * chunks * G, mask=m_partial, other=0.0)
    b_count = tl.maximum(tl.minimum(P - o_chunk * ROWS, ROWS), 0).to(tl.float32)[:, None]
    b_mean = tl.sum(b_means * b_count, 0) / P  # [GT]
    b_off = tl.where(m_partial, b_means - b_mean[None, :], 0.0)
    b_variance = (tl.sum(b_m2s, 0) / CPG + tl.sum(b_off * b_off * b_count, 0)) / P
    b_scale = 1.0 / tl.sqrt(b_variance + eps)

    o_c = tl.program_id(1) * WIDTH + tl.arange(0, BC)  # [BC]
    m_c = (tl.arange(0, BC) < WIDTH) & (o_c < C)
    m_member = _members(WIDTH, CPG, GT, BC)
    b_mean_c = tl.sum(tl.where(m_member, b_mean[:, None], 0.0), 0)
    b_scale_c = tl.sum(tl.where(m_member, b_scale[:, None], 0.0), 0)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32) * b_scale_c
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if shift is not None:
        b_mean_c -= tl.load(shift + row * s_shift_b + o_c, mask=m_c, other=0.0).to(tl.float32)
    for start in range(0, ROWS, BP):
        o_p = first + start + tl.arange(0, BP)
        m = (o_p < P)[:, None] & m_c[None, :]
        p_x = x + row * s_x_b + (o_p.to(tl.int64) * s_x_p)[:, None] + o_c[None, :]
        b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean_c[None, :]) * b_w[None, :] + b_b[None, :]
        if SILU:
            b_y = b_y * tl.sigmoid(b_y)
        p_out = out + (row * P + o_p)[:, None] * C + o_c[None, :]
        tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m)
