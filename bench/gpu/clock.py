"""Timing on a GPU: captured calls, cold cache, contenders in turn, medians; and the ceilings that they are held to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 5
CALLS_A_ROUND = 10
CACHE_BYTES = 256 * 2**20
COPY_BYTES = 2**30
GEMM_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches today: fp16 GEMM in FLOP/s, copy in bytes/s, read and written bytes both counted."""

    flops: float
    bytes: float


def median_seconds(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each contender on the GPU's own clock.

    Each call is captured into a CUDA graph where it can be, so that a short kernel is not timed by its launch. Before
    each call the cache is overwritten, which also gives the CPU time to queue the call. Contenders take turns.
    """
    calls = {name: _captured(run) for name, run in contenders.items()}
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


def _captured(run: Callable[[], object]) -> Callable[[], object]:
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
    except RuntimeError:  # a call that waits for the device, or allocates in a way that a graph cannot hold
        torch.cuda.synchronize()
        return run
    return graph.replay


def _timed(call: Callable[[], object], cache: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cache.zero_()
    start.record()
    call()
    stop.record()
    return start, stop
