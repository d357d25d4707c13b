"""Embedding gather with Philox noise on the corrupted tokens: many rows of noise in one launch."""

import triton
import triton.language as tl

from ..common import philox_normal


@triton.jit
def corrupt_embed_kernel(
    out,  # [R, T, D], contiguous
    ids,  # [R, T] at strides (s_ids_r, s_ids_t)
    table,  # [V, D], contiguous
    positions,  # [T, D], contiguous
    mask,  # [R, T] at strides (s_mask_r, s_mask_t)
    sigma,  # [R] at stride s_sigma
    sample,  # [R] at stride s_sample
    seed,  # [R] at stride s_seed
    R,
    T,
    s_ids_r,
    s_ids_t,
    s_mask_r,
    s_mask_t,
    s_sigma,
    s_sample,
    s_seed,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: ``BR`` rows of one token, ``BD`` channels. Grid ``(T * cdiv(R, BR), cdiv(D, BD))``."""
    token = tl.program_id(0) % T
    o_r = (tl.program_id(0) // T).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    first = tl.program_id(1) * BD
    o_d = first + tl.arange(0, BD)  # [BD]
    m_r, m_d = o_r < R, o_d < D
    m_rd = m_r[:, None] & m_d[None, :]

    b_id = tl.load(ids + o_r * s_ids_r + token * s_ids_t, mask=m_r, other=0).to(tl.int64)
    b_word = tl.load(table + b_id[:, None] * D + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)  # [BR, BD]
    b_position = tl.load(positions + token * D + o_d, mask=m_d, other=0.0).to(tl.float32)

    b_mask = tl.load(mask + o_r * s_mask_r + token * s_mask_t, mask=m_r, other=0) != 0
    b_sigma = tl.where(b_mask, tl.load(sigma + o_r * s_sigma, mask=m_r, other=0.0), 0.0)
    if tl.max(tl.abs(b_sigma)) > 0:
        b_sample = tl.load(sample + o_r * s_sample, mask=m_r, other=0)
        b_seed = tl.load(seed + o_r * s_seed, mask=m_r, other=0)
        b_token = tl.zeros_like(b_sample) + token
        b_noise = philox_normal(b_seed[:, None], b_sample[:, None], b_token[:, None], first, BD)
        b_word += b_sigma[:, None] * b_noise
    b_out = b_word + b_position[None, :]
    tl.store(out + (o_r * T + token)[:, None] * D + o_d[None, :], b_out, mask=m_rd)
