"""SD1.x at 512 px on a GPU, 2 to 144 rows in fp16: lockstep traces beside the bare UNet and beside one hook a site.

python -m bench.bench_unet_gpu

Rivals run the same number of rows for as many steps: eager, channels-last ``torch.compile(mode="max-autotune")``, and
eager with a forward hook on every site that overwrites one row. Each figure is useful TFLOP/s of the forwards that the
plan needs, and the peak memory beside the weights. The goals are 1.2 times the best rival on an H100, and 400 TFLOP/s.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch

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
MODES = {"lockstep": False, "lockstep compiled": True, "lockstep max-autotune": "max-autotune"}


def traces(pipe: Any, rows: int) -> dict[str, Any]:
    """Requests of which every step has about ``rows`` rows: the engine's own modes."""
    runs = max(0, rows // 2 - 2)
    sites = [site.name for site in ft.discover_sites(pipe) if site.part == "unet"]
    texts = torch.randn(3, TOKENS, pipe.unet.config.cross_attention_dim)
    patches = [ft.Patch(sites[number % len(sites)]) for number in range(runs)]
    return {
        name: unet_request(
            pipe, texts[0], texts[1], patches, None, 0, STEPS, 7.5, texts[2], None, None, None, None, "corrupted",
            "free", 0.0, rows, mode,
        )
        for name, mode in MODES.items()
    }  # fmt: skip


def rivals(pipe: Any, rows: int) -> dict[str, Callable[[], object]]:
    """The bare UNet on ``rows`` rows, ``STEPS`` times."""
    plain = pipe.unet
    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    graph = torch.compile(fast, mode="max-autotune", dynamic=False)
    sample = torch.randn(rows, 4, 64, 64, device="cuda", dtype=torch.float16)
    text = torch.randn(rows, TOKENS, plain.config.cross_attention_dim, device="cuda", dtype=torch.float16)
    strided = sample.contiguous(memory_format=torch.channels_last)

    def overwrite(module: Any, args: Any, output: Any) -> Any:
        output[-1] = output[0]
        return output

    pairs = [(site.module, overwrite) for site in ft.discover_sites(pipe) if site.part == "unet"]

    def repeat(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(STEPS)]

    def hooked() -> object:
        with hooks(pairs):
            return plain(sample, 10, text)

    return {
        "eager": repeat(lambda: plain(sample, 10, text)),
        "hooks": repeat(hooked),
        "compile max-autotune": repeat(lambda: graph(strided, 10, text)),
    }


@torch.no_grad()
def main() -> None:
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU: nothing measured")
        return
    pipe = ft.zoo.random_pipeline("sd15", dtype=torch.float16, device="cuda")
    flops = cost_of(describe_unet(pipe.unet), Dims(64, 64, TOKENS)).flops
    for rows in BATCHES:
        requests = traces(pipe, rows)
        forwards = dict.fromkeys(("eager", "hooks", "compile max-autotune"), float(rows * STEPS))
        forwards |= {name: plan_summary([request]).forwards for name, request in requests.items()}
        ours = {name: (lambda request=request: run_request(request)) for name, request in requests.items()}
        times = interleaved(rivals(pipe, rows) | ours, ROUNDS)
        record.append(
            "unet_gpu",
            [
                {"rows": rows, "contender": name, "median_s": round(one.median, 4), "peak_mib": one.peak_mib,
                 "useful_tflops": round(forwards[name] * flops / one.median / 1e12, 1)}
                for name, one in times.items()
            ],
        )  # fmt: skip
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
