"""Where a UNet row's time goes, by kind of operation, and what remains if only its products took time.

    python -m bench.bench_unet_floor

Bare is one eager call of the UNet in channels-last, in its best batch; compiled is the free sweep of `bench.bench_unet`
with ``compile=True``, by the forward. The floor is every product at the best rate that this machine showed here, and
all else free: no fusion and no layout goes below it, only other algorithms or fewer operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile

import fasttrace as ft
from fasttrace.engine.denoise.trace import plan_summary, run_request
from fasttrace.profile.ceilings import gemm_rate, seconds_of
from fasttrace.profile.flops import flop_counter

from . import record
from .bench_unet import BATCHES, Bench
from .timing import interleaved

ROUNDS = 3
KINDS = {
    "convolution": ("convolution",),
    "linear": ("addmm", "aten::mm", "linear"),
    "attention": ("attention", "bmm", "softmax"),
    "norm": ("norm",),
    "activation": ("silu", "gelu"),
    "fused": ("CompiledFxGraph",),
}
"""Kinds by what the profiler calls their operations; everything else is ``other``: copies, additions, dispatch."""

PRODUCTS = ("convolution", "linear", "attention")


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def milliseconds(run: Callable[[], object], total: float) -> Counter[str]:
    """Time of each kind of operation in a call, scaled to the ``total`` ms a row that it takes without the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    kinds: Counter[str] = Counter()
    for event in profiled.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total
    return Counter({kind: time * total / sum(kinds.values()) for kind, time in kinds.items()})


def gflop(run: Callable[[], object], rows: float) -> Counter[str]:
    """Operations of each kind, in GFLOP a row, taps of convolutions on the padding counted."""
    with flop_counter() as counter:
        run()
    kinds: Counter[str] = Counter()
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kinds[kind_of(str(operation).replace(".", "::"))] += flops / rows / 1e9
    return kinds


def best_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large product or of one of the UNet's convolutions over and over, whichever is faster."""
    sample = torch.randn(BATCHES[1], 128, 8, 8).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(dtype, memory_format=torch.channels_last)
    flops = 2.0 * weight.numel() * sample.numel() / sample.shape[1]
    convolution = flops / seconds_of(lambda: conv2d(sample, weight, padding=1), 20, warmup=5)
    return max(gemm_rate(torch.device("cpu"), dtype), convolution) / 1e9


def row_of(dtype: torch.dtype, run: Callable[[], object], total: float, operations: Counter[str]) -> dict[str, Any]:
    """One row of the table: the time of each kind, its floor, and the floor with what is no product as it was."""
    times, rate = milliseconds(run, total), best_rate(dtype)
    floor = 1e3 * sum(operations.values()) / rate
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ms_row": round(total, 3),
        **{f"{kind}_ms": round(times[kind], 3) for kind in (*KINDS, "other")},
        "gflop_row": round(sum(operations.values()), 4),
        "best_gflop_s": round(rate),
        "floor_ms": round(floor, 3),
        "floor_and_rest_ms": round(floor + total - sum(times[kind] for kind in PRODUCTS), 3),
    }


@torch.no_grad()
def main() -> None:
    bench = Bench()
    patches = [ft.Patch(site) for site in bench.sites]
    eager = bench.request(patches)
    forwards = plan_summary([eager]).forwards
    types = {"compiled": torch.float32, "compiled, bfloat16": torch.bfloat16}
    bare = {f"bare {rows}": bench.bare(rows) for rows in BATCHES}
    calls: dict[str, Callable[[], object]] = {**bare}
    for name, dtype in types.items():
        fast = bench.request(patches, compile=True, dtype=dtype)
        calls[name] = lambda fast=fast: run_request(fast)
    counts = dict(zip(bare, BATCHES, strict=True)) | dict.fromkeys(types, forwards)
    totals = {name: 1e3 * one.median / counts[name] for name, one in interleaved(calls, ROUNDS).items()}
    best = min(bare, key=totals.__getitem__)
    operations = {best: gflop(bare[best], counts[best])} | dict.fromkeys(
        types, gflop(lambda: run_request(eager), forwards)
    )
    rows = [
        {"what": name.split()[0].strip(",")}
        | row_of(types.get(name, torch.float32), calls[name], totals[name], counted)
        for name, counted in operations.items()
    ]
    limit = rows[0]["ms_row"]
    for row in rows:
        row["times_bare"] = round(limit / row["ms_row"], 2)
        row |= {f"{floor}_times_bare": round(limit / row[f"{floor}_ms"], 2) for floor in ("floor", "floor_and_rest")}
        print(row, flush=True)
    record.append("unet_floor", rows)


if __name__ == "__main__":
    main()
