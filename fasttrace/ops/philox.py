"""The corruption's normal draws in torch, on any device: the twin of ``fasttrace.corruption.philox_normal``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_normals(seed: Tensor, sample: Tensor, token: Tensor, channels: int) -> Tensor:
    """Standard normals, one row of channels for each (seed, sample, token).

    Args:
        seed: 64-bit keys, int64 ``[n]``.
        sample, token: counters, integer ``[n]``, at least 0.
        channels: width ``D``, a multiple of four or not.

    Returns:
        fp32 ``[n, D]`` on the device of ``seed``. Equal to the reference up to the device's own log, sine and cosine.
    """
    quad = torch.arange(-(-channels // 4), device=seed.device)[None]
    zero = torch.zeros_like(quad)
    words = _philox4x32(seed[:, None], [quad, token.long()[:, None], sample.long()[:, None], zero])
    u0, u1, u2, u3 = (((word >> 9).float() + 0.5) * 2.0**-23 for word in words)
    normals = [n for a, b in ((u0, u1), (u2, u3)) for n in _box_muller(a, b)]
    return torch.stack(normals, -1).flatten(1)[:, :channels]


def _philox4x32(seed: Tensor, counters: list[Tensor]) -> list[Tensor]:
    """Ten rounds on words that lie in the lower half of int64. Products wrap, which leaves their 64 bits right."""
    x0, x1, x2, x3 = counters
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (product1 >> 32) & _MASK ^ x1 ^ k0, product1 & _MASK
        x2, x3 = (product0 >> 32) & _MASK ^ x3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [x0, x1, x2, x3]


def _box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = (-2.0 * u0.log()).sqrt(), 2.0 * math.pi * u1
    return radius * angle.cos(), radius * angle.sin()
