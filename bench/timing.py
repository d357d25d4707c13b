"""Timing of rivals in one process: interleaved rounds, medians, ratios round by round, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fasttrace.profile.peak import peak_of


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, a figure a round.

    Attributes:
        seconds: one per round, in order.
        peak_bytes: the most memory that its first call took beyond what was held before, where that was measured.
    """

    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak_mib(self) -> float | str:
        """``peak_bytes`` in MiB, for a column; empty where it was not measured."""
        return "" if self.peak_bytes is None else round(self.peak_bytes / 2**20, 1)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times faster this is than ``other``: lowest, median and highest over the rounds."""
        ratios = sorted(b / a for a, b in zip(self.seconds, other.seconds, strict=True))
        return ratios[0], statistics.median(ratios), ratios[-1]


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., so that a drift of the machine meets all of them alike.

    The first round of the warm-up measures memory; without one, memory is not known.
    """
    peaks: dict[str, int | None] = dict.fromkeys(contenders)
    for round_ in range(warmup):
        for name, run in contenders.items():
            if round_ == 0:
                peaks[name] = peak_of(run)[1]
            else:
                run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values), peaks[name]) for name, values in seconds.items()}
