"""Every UNet site restored at every step, one prompt and seed, against the bare UNet and against plain hooks.

python -m bench.bench_unet [free|forced|grid|hooks|compile|bf16|patches ...]

The floor is the bare UNet (no runs, no patches, no scheduler) in channels-last at the batch that is best in the same
process, times the forwards that the exact plan needs. Hooks run a site after another, as the published batches of
three, or all sites in one batch. Peak memory is beside the weights. The UNet is the packaged model's where it is there,
else one of 11.2 M parameters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.engine.denoise.trace import UNetPlanSummary, UNetRequest, plan_summary, run_request, unet_request

from . import record
from .rivals import hooked_batch
from .timing import Timing, beside, first_calls, interleaved

STEPS, TOKENS, ROUNDS = 20, 20, 3
BATCHES = (32, 43, 64)
PARTS = ("free", "forced", "grid", "hooks", "compile", "bf16", "patches")


def pipeline() -> tuple[str, Any]:
    try:
        return "emoji", ft.load_pipeline("emoji", device="cpu")
    except (ft.FasttraceError, OSError):
        pass
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
    )  # fmt: skip
    parts = ft.zoo.random_pipeline("tiny-sd15").components | {"unet": unet.eval().requires_grad_(False)}
    return "11.2M random", StableDiffusionPipeline(**parts, requires_safety_checker=False)


class Bench:
    """The pipeline, its texts and its bare UNet."""

    def __init__(self) -> None:
        self.name, self.pipe = pipeline()
        config = self.pipe.unet.config
        self.texts = torch.randn(3, TOKENS, config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
        self.sites = [site.name for site in ft.discover_sites(self.pipe) if site.part == "unet"]
        self.unet = copy.deepcopy(self.pipe.unet).to(memory_format=torch.channels_last)

    def request(self, patches: Iterable[Any], protocol: str = "free", **options: Any) -> UNetRequest:
        clean, corrupted, negative = self.texts
        return unet_request(
            self.pipe, clean, corrupted, patches, None, 0, STEPS, 7.5, negative, None, None, None, None, "corrupted",
            protocol, 0.0, None, **options,
        )  # fmt: skip

    def bare(self, rows: int) -> Callable[[], Tensor]:
        """One call of the user's UNet on ``rows`` rows."""
        config = self.pipe.unet.config
        sample = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
        sample = sample.contiguous(memory_format=torch.channels_last)
        text = self.texts[0].expand(rows, -1, -1)
        return lambda: self.unet(sample, 10, text, return_dict=False)[0]

    def against_bare(self, part: str, request: UNetRequest, goal: str) -> dict[str, Any]:
        """Time one trace and the bare UNet in turn, as a share of what the plan's forwards cost bare."""
        plan = plan_summary([request])
        contenders: dict[str, Callable[[], object]] = {f"bare {rows}": self.bare(rows) for rows in BATCHES}
        times = interleaved(contenders | {"trace": lambda: run_request(request)}, ROUNDS)
        sample = {rows: times[f"bare {rows}"].median / rows for rows in BATCHES}
        best = min(sample, key=sample.__getitem__)
        shares = sorted(
            plan.forwards * bare / best / trace
            for bare, trace in zip(times[f"bare {best}"].seconds, times["trace"].seconds, strict=True)
        )
        return {
            "part": part,
            "model": self.name,
            "goal": goal,
            "of_bare": round(shares[len(shares) // 2], 3),
            "of_bare_low": round(shares[0], 3),
            "of_bare_high": round(shares[-1], 3),
            "median_s": round(times["trace"].median, 3),
            "bare_ms_row": round(1e3 * sample[best], 2),
            "bare_batch": best,
            "peak_mib": times["trace"].peak_mib,
            "bare_peak_mib": times[f"bare {best}"].peak_mib,
            **_counts(plan),
        }


def _counts(plan: UNetPlanSummary) -> dict[str, Any]:
    return {
        "forwards": round(plan.forwards),
        "rows": plan.rows,
        "naive_once": plan.naive_shared,
        "naive_three": plan.naive_three,
    }


def free(bench: Bench) -> dict[str, Any]:
    return bench.against_bare("free", bench.request(ft.Patch(site) for site in bench.sites), ">= 0.95")


def forced(bench: Bench) -> dict[str, Any]:
    request = bench.request((ft.Patch(site) for site in bench.sites), "teacher_forced")
    return bench.against_bare("teacher_forced", request, ">= 0.85")


def grid(bench: Bench) -> dict[str, Any]:
    """Every other site at every second step: each run forks at its own."""
    runs = [ft.Patch(site, steps=[step]) for site in bench.sites[::8] for step in range(0, STEPS, 2)]
    return bench.against_bare("grid of (site, step)", bench.request(runs), "half of the steps")


def patches(bench: Bench) -> dict[str, Any]:
    """A batch of patched runs and one of as many that differ by their texts alone, by the row."""
    names = [f"text {number}" for number in range(len(bench.sites))]
    texts = torch.randn(len(names), *bench.texts.shape[1:], generator=torch.Generator().manual_seed(2))
    clean, corrupted, negative = bench.texts
    sources = dict(zip(names, texts, strict=True))
    unpatched = unet_request(
        bench.pipe, clean, corrupted, [()] * len(names), None, 0, STEPS, 7.5, negative, None, None, None, sources,
        names, "free", 0.0, None,
    )  # fmt: skip
    requests = {"patched": bench.request(ft.Patch(site) for site in bench.sites), "unpatched": unpatched}
    # A goal of 3% where a round varies by 10% wants more rounds than a ratio of four.
    times = interleaved({name: lambda one=one: run_request(one) for name, one in requests.items()}, 3 * ROUNDS)
    forwards = {name: plan_summary([one]).forwards for name, one in requests.items()}
    scale = forwards["unpatched"] / forwards["patched"]
    lowest, median, highest = (round(scale * ratio, 3) for ratio in times["unpatched"].ratio_to(times["patched"]))
    return {"part": "patched over unpatched batch", "model": bench.name, "goal": "<= 1.03",
            "ratio": median, "ratio_lowest": lowest, "ratio_highest": highest}  # fmt: skip


def hooks(bench: Bench, sample: int = 4) -> list[dict[str, Any]]:
    """Three ways of plain hooks, from the same latents, equal before they are timed; two are sampled and scaled."""
    every = bench.request(ft.Patch(site) for site in bench.sites)
    count, modules = len(bench.sites), {site.name: site for site in ft.discover_sites(bench.pipe)}
    spread = range(0, count, -(-count // sample))
    few = [bench.sites[place] for place in spread]
    some, none = bench.request(ft.Patch(site) for site in few), bench.request([])

    def pipeline_call(names: Sequence[str]) -> Tensor:
        chosen = [modules[name] for name in names]
        options = {"num_inference_steps": STEPS, "guidance_scale": 7.5}
        return hooked_batch(bench.pipe, bench.texts, every.latents, chosen, **options)[2:]

    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_request(every).restored,
        "clean and corrupted": lambda: run_request(none, "oracle"),
        "and some": lambda: run_request(some, "oracle").restored,
        "threes": lambda: torch.cat([pipeline_call([name]) for name in few]),
        "one batch": lambda: pipeline_call(bench.sites),
    }
    results, peaks = first_calls(runs)
    ours, differences = results["ours"], {}
    for name, expected in (("and some", ours[spread]), ("threes", ours[spread]), ("one batch", ours)):
        differences[name] = float((results[name] - expected).norm() / expected.norm())
        assert differences[name] < 1e-3, f"{name} differs by {differences[name]:.1e}"
    times = interleaved(runs, ROUNDS, peaks=peaks)
    both = zip(times["clean and corrupted"].seconds, times["and some"].seconds, strict=True)
    scaled = Timing(tuple(a + (b - a) * count / len(few) for a, b in both), peaks["and some"])
    what = f"sweep of {count} sites, {STEPS} steps, {bench.name}"
    taken = f"{len(few)} of {count} sites"
    rivals = (
        ("and some", "one hooked run a site, clean and corrupted once", taken, scaled, 1.0),
        ("threes", "clean, corrupted and restored as a batch, a site", taken, times["threes"], count / len(few)),
        ("one batch", "hooks batched: all sites in one batch, one hook a site", "all", times["one batch"], 1.0),
    )
    return [
        beside({"what": what, "rival": rival, "timed": timed}, times["ours"], timing, scale)
        | {"relative_difference": f"{differences[name]:.1e}"}
        for name, rival, timed, timing, scale in rivals
    ]


def compiled(bench: Bench) -> dict[str, Any]:
    request = bench.request((ft.Patch(site) for site in bench.sites), compile=True)
    return bench.against_bare("free, compiled", request, ">= 1.5")


def bfloat16(bench: Bench) -> dict[str, Any]:
    request = bench.request((ft.Patch(site) for site in bench.sites), compile=True, dtype=torch.bfloat16)
    return bench.against_bare("free, compiled, bfloat16", request, ">= 2.5")


RUN = dict(zip(PARTS, (free, forced, grid, hooks, compiled, bfloat16, patches), strict=True))


@torch.no_grad()
def main(parts: list[str]) -> None:
    unknown = [part for part in parts if part not in RUN]
    if unknown:
        raise SystemExit(f"unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    bench = Bench()
    for part in parts or PARTS:
        found = RUN[part](bench)
        rows = found if isinstance(found, list) else [found]
        print(*rows, sep="\n", flush=True)
        record.append("unet", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
