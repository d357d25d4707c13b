"""How a kernel reads a source map: which row a position computes, and what is written over the computed value.

A copy from another row of the batch is done by *gathering the inputs*: the position computes what its source row
computes, from that row's inputs, instead of waiting for that row's result. Thus no program reads what another writes.
The codes are those of ``fasttrace/ops/restore.py``.
"""

import triton
import triton.language as tl

from .common import ADD, KEEP, ZERO, philox_normal


@triton.jit
def is_computed(b_code, B):
    """Whether a position needs a computed value: its own, its source row's, or one that a slot is added to."""
    return (b_code < B) & (b_code != ZERO)


@triton.jit
def is_read(b_code, o_b, B):
    """Whether anyone reads what position ``(o_b, p)`` feeds into a site that gathers: its own value is not replaced."""
    return (b_code == KEEP) | (b_code <= ADD) | (b_code == o_b)


@triton.jit
def source_row(b_code, o_b, B):
    """Batch row whose inputs a position of row ``o_b`` computes from."""
    return tl.where((b_code >= 0) & (b_code < B), b_code, o_b)


@triton.jit
def apply_slots(b_v, b_code, B, bank, o_p, o_d, m_d, s_bank_s, s_bank_p):
    """Write zeros and bank slots over, or add slots to, computed values.

    Args:
        b_v: fp32 ``[R, D]``.
        b_code, o_p: codes and positions ``[R]``; rows out of range carry ``ZERO``.
        bank: ``[S, P, D]`` at strides ``(s_bank_s, s_bank_p, 1)``, or None.
        o_d, m_d: channels ``[D]`` and which of them exist.
    """
    if bank is not None:
        m_slot = (b_code >= B) | (b_code <= ADD)
        if tl.max(m_slot.to(tl.int32), 0) > 0:
            slot = tl.where(b_code >= B, b_code - B, ADD - b_code).to(tl.int64)
            p_bank = bank + (slot * s_bank_s + o_p.to(tl.int64) * s_bank_p)[:, None] + o_d[None, :]
            b_slot = tl.load(p_bank, mask=m_slot[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_v = tl.where((b_code >= B)[:, None], b_slot, b_v)
            b_v = tl.where((b_code <= ADD)[:, None], b_v + b_slot, b_v)
    return tl.where((b_code == ZERO)[:, None], 0.0, b_v)


@triton.jit
def add_noise(b_v, m_r, sigma, seed, noise_mask, o_b, o_p, first_channel, s_mask_b, s_mask_p, BLOCK_D: tl.constexpr):
    """Add ``sigma[b] * normal(seed[b], sample 0, position, channel)`` where the mask says so; nothing if sigma is None.

    Args:
        b_v: fp32 ``[R, BLOCK_D]``, whose first column is ``first_channel``.
        m_r, o_b, o_p: which rows exist, their batch rows and their positions, ``[R]``.
        sigma, seed: fp32 and int64, ``[B]`` contiguous.
        noise_mask: bool ``[B, P]`` at strides ``(s_mask_b, s_mask_p)``.
    """
    if sigma is not None:
        p_mask = noise_mask + o_b.to(tl.int64) * s_mask_b + o_p.to(tl.int64) * s_mask_p
        m_noise = tl.load(p_mask, mask=m_r, other=0) != 0
        if tl.max(m_noise.to(tl.int32), 0) > 0:
            b_sigma = tl.load(sigma + o_b, mask=m_noise, other=0.0)[:, None]
            b_seed = tl.load(seed + o_b, mask=m_noise, other=0)[:, None]
            o_token = o_p[:, None]
            b_normal = philox_normal(b_seed, tl.zeros_like(o_token), o_token, first_channel, BLOCK_D)
            b_v = tl.where(m_noise[:, None], b_v + b_sigma * b_normal, b_v)
    return b_v
