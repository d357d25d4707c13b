"""Timing of rivals in one process: interleaved rounds, medians, ratios round by round, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fasttrace.profile.peak import peak_of


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, a figure a round.

    Attributes:
        seconds: one per round, in order.
        peak_bytes: the most memory that its first call took beyond what was held before; ``None`` if not measured.
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


def beside(row: Mapping[str, Any], ours: Timing, rival: Timing, scale: float = 1.0) -> dict[str, Any]:
    """A row of results: the columns of ``row``, then both medians, the ratio with its range, and both peaks.

    Args:
        row: says what was compared.
        scale: of the whole work to what the rival did of it; its time is multiplied, its memory is not.
    """
    lowest, median, highest = (scale * ratio for ratio in ours.ratio_to(rival))
    return {
        **row,
        "median_s": float(f"{ours.median:.4g}"),
        "rival_median_s": float(f"{scale * rival.median:.4g}"),
        "ratio": float(f"{median:.3g}"),
        "ratio_lowest": float(f"{lowest:.3g}"),
        "ratio_highest": float(f"{highest:.3g}"),
        "peak_mib": ours.peak_mib,
        "rival_peak_mib": rival.peak_mib,
    }


def first_calls(contenders: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Call each contender once: the warm-up. Their results, to be compared, and the memory that each took at most."""
    calls = {name: peak_of(run) for name, run in contenders.items()}
    return {name: result for name, (result, _) in calls.items()}, {name: peak for name, (_, peak) in calls.items()}


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    peaks: Mapping[str, int | None] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., so that a drift of the machine meets all of them alike.

    Args:
        contenders: what to call, by name.
        rounds: how often each is timed.
        warmup: rounds before; the first of them measures memory.
        peaks: from `first_calls`, which was the warm-up then.
    """
    if peaks is None:
        peaks = first_calls(contenders)[1] if warmup else dict.fromkeys(contenders)
        for _ in range(warmup - 1):
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
    return {name: Timing(tuple(values), peaks[name]) for name, values in seconds.items()}
