"""Power laws: the slope of a line through measurements in logarithmic coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 4


@dataclass(frozen=True)
class PowerLaw:
    """``value = factor * size ** exponent``, fitted between two sizes."""

    exponent: float
    factor: float
    low: float
    high: float

    def at(self, size: float) -> float:
        return float(self.factor * size**self.exponent)

    def __str__(self) -> str:
        return f"size ** {self.exponent:.2f} from {self.low:g} to {self.high:g}"


def power_law(sizes: Sequence[float], values: Sequence[float], largest: int = LARGEST) -> PowerLaw:
    """Least squares in logarithms through the ``largest`` sizes: below them what a call costs at least covers the law.

    Raises:
        ValueError: fewer than two sizes, or a value that is not positive.
    """
    pairs = sorted(zip(sizes, values, strict=True))[-largest:]
    x, y = np.array(pairs, dtype=float).T
    if len(pairs) < 2 or not bool((y > 0).all()):
        raise ValueError(f"{pairs}: expected at least two sizes, and values above 0")
    slope, offset = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(slope), float(np.exp(offset)), float(x[0]), float(x[-1]))
