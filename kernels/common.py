"""Triton helpers that several ops share: the corruption's normal draws, and the codes of a source map."""

import triton
import triton.language as tl

# Codes of a source map, as fasttrace/ops/restore.py defines them: ADD is the first of the codes "computed plus slot".
KEEP = tl.constexpr(-1)
ZERO = tl.constexpr(-2)
ADD = tl.constexpr(-3)


@triton.jit
def _uniform(word):
    """Uniform in (0, 1), exact in fp32, from the upper 23 bits of a Philox word."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def _box_muller(word0, word1):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word0)))
    angle = 6.283185307179586 * _uniform(word1)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def philox_normal(seed, sample, token, first_channel, BLOCK_D: tl.constexpr):
    """Standard normals of ``fasttrace.corruption.philox_normal``, for one token or a column of tokens.

    Args:
        seed: int64 key, a scalar or ``[R, 1]``.
        sample, token: counters, int32 ``[R, 1]``.
        first_channel: channel of the first column, a multiple of four.
        BLOCK_D: columns, a power of two, at least four.

    Returns:
        fp32 ``[R, BLOCK_D]``. Column ``d`` belongs to channel ``first_channel + d``.
    """
    quad = first_channel // 4 + tl.arange(0, BLOCK_D // 4)[None, :] + tl.zeros_like(token)  # [R, BLOCK_D // 4]
    token = tl.zeros_like(quad) + token
    sample = tl.zeros_like(quad) + sample
    w0, w1, w2, w3 = tl.philox(seed, quad, token, sample, tl.zeros_like(quad))
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
