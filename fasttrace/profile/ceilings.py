"""What the machine can do at most: its matrix-product rate and its copy bandwidth, measured here and now."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def seconds_of(run: Callable[[], object], rounds: int, warmup: int = 1) -> float:
    """Median wall-clock seconds of a call, waiting for a GPU where there is one."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """FLOP/s of a large square matrix product."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: a @ b, rounds, warmup=2)


def copy_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Bytes/s of a large copy, counting bytes read and bytes written."""
    source = torch.randn(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / seconds_of(lambda: target.copy_(source), rounds, warmup=2)


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        flops: FLOP/s of a large matrix product in the model's dtype.
        bandwidth: bytes/s of a large copy.
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which no version of a computation runs: the larger of arithmetic and traffic."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both, for a model on ``device`` in ``dtype``."""
    return Ceilings(gemm_rate(device, dtype), copy_bandwidth(device))


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
