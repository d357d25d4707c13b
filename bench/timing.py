"""Timing of rivals in one process: interleaved rounds, medians, and ratios round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, a figure a round.

    Attributes:
        seconds: one per round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times faster this is than ``other``: lowest, median and highest over the rounds."""
        ratios = sorted(b / a for a, b in zip(self.seconds, other.seconds, strict=True))
        return ratios[0], statistics.median(ratios), ratios[-1]


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., so that a drift of the machine meets all of them alike."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
