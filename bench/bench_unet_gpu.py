"""SD1.x at 512 px on a GPU in fp16: the engine's lockstep calls beside the bare UNet and beside one hook a site.

    python -m bench.bench_unet_gpu [--rows 2 16 64] [--profile FILE]

Rivals run the same number of rows for as many steps: eager in channels-last, the same captured into a CUDA graph, with
a forward hook on every site that overwrites one row, and ``torch.compile(mode="max-autotune")``. Each figure is useful
TFLOP/s of the forwards that the plan needs, and the peak memory beside the weights. What compiles takes minutes, so it
comes last; rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fasttrace as ft
from fasttrace.engine.denoise.cost import cost_of
from fasttrace.engine.denoise.trace import plan_summary, run_request, unet_request
from fasttrace.engine.hooks import hooks
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims

from . import record
from .timing import interleaved

BATCHES = (2, 8, 16, 32, 64, 96, 144)
STEPS, TOKENS, ROUNDS = 4, 77, 3
PROFILED_ROWS = 16
Call = Callable[[], object]


class Bench:
    """A random pipeline of the true architecture, and its calls; ``toy`` is for a test on a CPU."""

    def __init__(self, toy: bool = False) -> None:
        self.device = "cpu" if toy else "cuda"
        self.dtype = torch.float32 if toy else torch.float16
        self.pipe = ft.zoo.random_pipeline("tiny-sd15" if toy else "sd15", dtype=self.dtype, device=self.device)
        self.side = self.pipe.unet.config.sample_size
        self.sites = [site for site in ft.discover_sites(self.pipe) if site.part == "unet"]
        self.plain = copy.deepcopy(self.pipe.unet).to(memory_format=torch.channels_last)
        self.flops = cost_of(describe_unet(self.pipe.unet), Dims(self.side, self.side, TOKENS)).flops

    def engine(self, rows: int, mode: bool | str = False) -> tuple[Call, float]:
        """A lockstep trace of which every step has about ``rows`` rows, and its forwards."""
        texts = torch.randn(3, TOKENS, self.pipe.unet.config.cross_attention_dim)
        patches = [ft.Patch(self.sites[number % len(self.sites)].name) for number in range(max(0, rows // 2 - 2))]
        request = unet_request(
            self.pipe, texts[0], texts[1], patches, None, 0, STEPS, 7.5, texts[2], None, None, None, None, "corrupted",
            "free", 0.0, rows, mode,
        )  # fmt: skip
        return lambda: run_request(request), float(plan_summary([request]).forwards)

    def inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = {"device": self.device, "dtype": self.dtype}
        sample = torch.randn(rows, 4, self.side, self.side, **given).contiguous(memory_format=torch.channels_last)
        text = torch.randn(rows, TOKENS, self.pipe.unet.config.cross_attention_dim, **given)
        return sample, torch.tensor(10, device=self.device), text

    def eager(self, rows: int) -> Call:
        inputs = self.inputs(rows)
        return lambda: [self.plain(*inputs) for _ in range(STEPS)]

    def hooked(self, rows: int) -> Call:
        inputs = self.inputs(rows)

        def overwrite(module: Any, args: Any, output: Any) -> Any:
            output[-1] = output[0]
            return output

        def run() -> object:
            with hooks([(site.module, overwrite) for site in self.sites]):
                return [self.pipe.unet(*inputs) for _ in range(STEPS)]

        return run

    def captured(self, rows: int) -> Call:
        inputs = self.inputs(rows)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.plain(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.plain(*inputs)
        return lambda: [graph.replay() for _ in range(STEPS)]

    def compiled(self, rows: int) -> Call:
        inputs = self.inputs(rows)
        fast = torch.compile(self.plain, mode="max-autotune", dynamic=False)
        return lambda: [fast(*inputs) for _ in range(STEPS)]

    def first(self, rows: int) -> dict[str, Callable[[], tuple[Call, float]]]:
        """Contenders that start in seconds, and their forwards."""
        bare = float(rows * STEPS)
        found: dict[str, Callable[[], tuple[Call, float]]] = {
            "eager": lambda: (self.eager(rows), bare),
            "hooks": lambda: (self.hooked(rows), bare),
            "engine": lambda: self.engine(rows),
        }
        return found if self.device == "cpu" else found | {"captured": lambda: (self.captured(rows), bare)}

    def slow(self, rows: int) -> dict[str, Callable[[], tuple[Call, float]]]:
        """Contenders that compile, and eager once more beside them."""
        bare = float(rows * STEPS)
        return {
            "eager": lambda: (self.eager(rows), bare),
            "compile max-autotune": lambda: (self.compiled(rows), bare),
            "engine compiled": lambda: self.engine(rows, True),
            "engine max-autotune": lambda: self.engine(rows, "max-autotune"),
        }


def measure(bench: Bench, rows: int, makers: Mapping[str, Callable[[], tuple[Call, float]]]) -> None:
    """Time contenders beside each other and write their rows; one that cannot run is named and left out."""
    calls, forwards = {}, {}
    for name, make in makers.items():
        try:
            call, forwards[name] = make()
            call()
        except Exception as reason:  # an engine or a compiler that fails leaves the others to be measured
            print(f"    {rows:>4} rows  {name:<22} cannot run: {str(reason).strip().splitlines()[:1]}", flush=True)
        else:
            calls[name] = call
    times = interleaved(calls, ROUNDS)
    table = [
        {
            "rows": rows,
            "contender": name,
            "ms_row": round(1e3 * one.median / forwards[name], 4),
            "median_s": round(one.median, 4),
            "peak_mib": one.peak_mib,
            "useful_tflops": round(forwards[name] * bench.flops / one.median / 1e12, 1),
        }
        for name, one in times.items()
    ]
    record.append("unet_gpu", table)
    for row in table:
        print(f"    {rows:>4} rows  {row['contender']:<22} {row['ms_row']:>9} ms/row {row['useful_tflops']:>7} TFLOP/s")
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def write_profile(bench: Bench, path: Path) -> None:
    """Where the time of one eager call and of one engine call goes, by kernel."""
    for name in ("eager", "engine"):
        call, _ = bench.first(PROFILED_ROWS)[name]()
        call()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device == "cuda" else [])]
        with profile(activities=activities) as profiled:
            call()
        order = f"self_{bench.device}_time_total"
        table = profiled.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        with path.open("a") as file:
            file.write(f"== {name}, {PROFILED_ROWS} rows, {STEPS} steps\n{table}\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--profile", type=Path, help="file that receives the time of each kernel")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="seconds since the epoch: nothing begins after"
    )
    parser.add_argument("--toy", action="store_true", help="the smallest shapes on a CPU, to try this without a GPU")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.toy):
        print("needs an NVIDIA GPU: nothing measured")
        return
    bench = Bench(given.toy)
    for rows in given.rows:
        if time.time() < given.until:
            measure(bench, rows, bench.first(rows))
    if given.profile is not None and time.time() < given.until:
        write_profile(bench, given.profile)
    for rows in [] if given.toy else given.rows:
        if time.time() < given.until:
            measure(bench, rows, bench.slow(rows))


if __name__ == "__main__":
    main()
