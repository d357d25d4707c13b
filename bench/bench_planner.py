"""How long it takes to check and count a teacher-forced sweep of UNet patches, up to 100,000 of them; no model runs.

    python -m bench.bench_planner

or, with pytest-benchmark's own table and options, up to 10,000: ``pytest bench/bench_planner.py --benchmark-only``.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.engine.denoise.trace import plan_summary
from fasttrace.profile.savings import sweep_request

from . import record
from .timing import interleaved

SIZES = (10, 100, 1_000, 10_000, 100_000)


def unet_patches(pipe: Any, count: int) -> list[ft.Patch]:
    """Patches that go round the sites, each at a step of its own."""
    sites = [site for site in ft.discover_sites(pipe) if site.part == "unet"]
    return [ft.Patch(sites[n % len(sites)], steps=[n // len(sites) % 20]) for n in range(count)]


def plan_unet(pipe: Any, patches: list[ft.Patch]) -> Any:
    return plan_summary([sweep_request(pipe, patches, 20, 7.5, "teacher_forced")])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ft.zoo.random_pipeline("tiny-sd15")


@pytest.mark.parametrize("count", SIZES[:4])
def test_plan_of_a_unet_sweep(benchmark: Any, pipe: Any, count: int) -> None:
    patches = unet_patches(pipe, count)
    summary = benchmark(plan_unet, pipe, patches)
    assert summary.naive_shared == (count + 2) * 2 * 21


def main(rounds: int = 3) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    rows = []
    for count in SIZES:
        patches = unet_patches(pipe, count)
        timing = interleaved({"plan": lambda patches=patches: plan_unet(pipe, patches)}, rounds)["plan"]
        rows.append(
            {
                "what": "check and count a teacher-forced UNet sweep",
                "patches": count,
                "median_s": round(timing.median, 4),
                "us_a_patch": round(1e6 * timing.median / count, 1),
                "peak_mib": timing.peak_mib,
            }
        )
        print(f"{count} patches: {timing.median:.3f} s")
    record.append("planner", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
