"""Gaussian corruption of the subject's token embeddings, drawn by a counter-based generator.

A draw depends on nothing but its key and its counter, so that the CPU, Triton and CUDA agree, at any batch size and in
any order. Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); uniform to
normal by Box and Muller (1958).

============  ==========================================================
Philox word   value
============  ==========================================================
key 0, 1      low and high half of the 64-bit seed
counter 0     channel // 4 (each call yields four channels)
counter 1     token position
counter 2     noise sample
counter 3     0
============  ==========================================================

Of the four output words, (0, 1) give the normals of channels 4k and 4k + 1, and (2, 3) those of 4k + 2 and 4k + 3:
``r = sqrt(-2 ln u0)``, then ``r cos(2 pi u1)`` and ``r sin(2 pi u1)``, where ``u = (word >> 9 + 1/2) / 2^23`` lies
strictly inside (0, 1) and is exact in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import PatchError

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW_WORD = np.uint64(0xFFFFFFFF)


def philox4x32(seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox4x32 on broadcastable uint32 counters; four uint64 arrays that hold 32-bit words."""
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = _MULTIPLIER_0 * x0, _MULTIPLIER_1 * x2
        high0, low0 = product0 >> np.uint64(32), product0 & _LOW_WORD
        high1, low1 = product1 >> np.uint64(32), product1 & _LOW_WORD
        x0, x1, x2, x3 = high1 ^ x1 ^ np.uint64(k0), low1, high0 ^ x3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return x0, x1, x2, x3


def philox_normal(seed: int, sample: int, tokens: Sequence[int] | np.ndarray | Tensor, channels: int) -> Tensor:
    """Standard normal draws for some token positions.

    Args:
        seed: 64-bit key.
        sample: index of the noise sample.
        tokens: positions, ``[n]``.
        channels: width of the embedding, ``D``; any number, a multiple of four or not.

    Returns:
        ``[n, D]`` float32 on the CPU. Row ``i`` depends on ``(seed, sample, tokens[i])`` alone.
    """
    position = np.asarray(tokens, dtype=np.uint64).reshape(-1, 1)
    quad = np.arange(-(-channels // 4), dtype=np.uint64).reshape(1, -1)
    words = philox4x32(seed, quad, position, np.full((1, 1), sample, np.uint64), np.zeros((1, 1), np.uint64))
    u = [((w >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23 for w in words]
    normals = np.empty((position.shape[0], quad.shape[1], 4), dtype=np.float64)
    for pair in (0, 2):
        radius, angle = np.sqrt(-2.0 * np.log(u[pair])), 2.0 * np.pi * u[pair + 1]
        normals[..., pair], normals[..., pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return torch.from_numpy(normals.reshape(position.shape[0], 4 * quad.shape[1])[:, :channels].astype(np.float32))


@dataclass(frozen=True)
class GaussianNoise:
    """Gaussian noise on the subject's word embeddings, before position embeddings and layer 0.

    Args:
        scale: standard deviation, as a number; or ``"3x"``: three times the standard deviation of the token-embedding
            table's rows for the study's subjects (the rule of ROME's ``s3``). A study resolves it once and records it.
        samples: independent noise samples for each prompt.
        seed: key of the generator. Draws differ by seed, sample, token position and channel, and by nothing else.

    Raises:
        PatchError: a scale that is neither a finite number >= 0 nor of the form ``"3x"``, fewer than one sample, or a
            number of samples or a seed that is no whole number.
    """

    scale: float | str = "3x"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise PatchError(f"{name}={value!r} of a corruption: expected a whole number")
        if self.samples < 1:
            raise PatchError(f"samples={self.samples}: a corruption needs at least 1 noise sample")
        self._factor()

    def _factor(self) -> float:
        text = self.scale[:-1] if isinstance(self.scale, str) and self.scale.endswith("x") else self.scale
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = float("nan")
        if not np.isfinite(value) or value < 0:
            raise PatchError(f'corruption scale {self.scale!r}: expected a number >= 0, or a multiple such as "3x"')
        return value

    def resolve(self, embedding_table: Tensor, subject_ids: Sequence[int]) -> float:
        """The standard deviation as a number: ``scale`` itself, or its multiple of the subjects' embedding spread.

        Args:
            embedding_table: token embeddings, ``[vocabulary, D]``.
            subject_ids: ids of all the study's subject tokens; each distinct id counts once.
        """
        if not isinstance(self.scale, str) or not self.scale.endswith("x"):
            return self._factor()
        if not subject_ids:
            raise PatchError(
                f"corruption scale {self.scale!r} is relative to the subjects' embeddings; no subjects given"
            )
        rows = embedding_table.detach()[torch.tensor(sorted(set(subject_ids)), device=embedding_table.device)]
        return self._factor() * float(rows.double().std(correction=0))

    def draw(self, sigma: float, sample: int, length: int, positions: Sequence[int], channels: int) -> Tensor:
        """Noise of one sample for a whole sequence: ``[length, channels]`` float32, zero outside ``positions``."""
        noise = torch.zeros(length, channels)
        if len(positions):
            noise[list(positions)] = sigma * philox_normal(self.seed, sample, list(positions), channels)
        return noise
