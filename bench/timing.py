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


def gemm_rate(size: int = 2048, dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """The machine's own GEMM rate in FLOP/s on a large square product: median over some rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = interleaved({"gemm": lambda: a @ b}, rounds, warmup=2)["gemm"]
    return 2.0 * size**3 / timing.median


def copy_bandwidth(mebibytes: int = 256, rounds: int = 5) -> float:
    """The machine's own copy bandwidth in bytes/s, counting bytes read and bytes written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, rounds, warmup=2)["copy"]
    return 2.0 * source.nbytes / timing.median
