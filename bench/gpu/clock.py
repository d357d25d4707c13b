"""Timing on a GPU: captured calls, cold cache, contenders in turn, medians; and the ceilings that they are held to."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 5
CALLS_A_ROUND = 10
CACHE_BYTES = 256 * 2**20
COPY_BYTES = 2**30
GEMM_SIZE = 8192
POISONED = 75
"""Exit status of a process whose device no longer answers: whoever started it goes on without the culprit."""


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches today: fp16 GEMM in FLOP/s, copy in bytes/s, read and written bytes both counted."""

    flops: float
    bytes: float


def median_seconds(
    contenders: Mapping[str, Callable[[], object]], trying: Callable[[str], object] = lambda name: None
) -> dict[str, float]:
    """Median seconds of each contender on the GPU's own clock.

    Each call is captured into a CUDA graph where it can be, so that a short kernel is not timed by its launch. Before
    each call the cache is overwritten, which also gives the CPU time to queue the call. Contenders take turns.
    ``trying`` hears the name of each contender before it is captured, which is what a process may not survive.
    """
    calls = {}
    for name, run in contenders.items():
        trying(name)
        calls[name] = captured(run)
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            events = [_timed(call, cache) for _ in range(CALLS_A_ROUND)]
            torch.cuda.synchronize()
            seconds[name] += [1e-3 * start.elapsed_time(stop) for start, stop in events]
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceilings() -> Ceilings:
    """Measure both ceilings, once a process."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.float16, device="cuda") for _ in range(2))
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda").zero_()
    target = torch.empty_like(source)
    seconds = median_seconds({"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceilings(2.0 * GEMM_SIZE**3 / seconds["gemm"], 2.0 * COPY_BYTES / seconds["copy"])


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of ``run`` captured into a graph; ``run`` itself if it waits for the device or fails in a capture.

    Raises:
        SystemExit: ``POISONED``, if the device no longer answers after a capture that failed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
    except Exception:  # whatever the call raises inside a capture, it can still be timed outside one
        require_answer()
        return run
    require_answer()
    return graph.replay


def require_answer() -> None:
    """Leave the process with ``POISONED`` unless the device still computes: its errors stay for a process's life."""
    try:
        alive = int(torch.ones(2, device="cuda").sum()) == 2
        torch.cuda.synchronize()
    except RuntimeError:
        alive = False
    if not alive:
        sys.exit(POISONED)


def _timed(call: Callable[[], object], cache: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cache.zero_()
    start.record()
    call()
    stop.record()
    return start, stop
