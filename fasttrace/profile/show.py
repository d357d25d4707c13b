"""A profile as tables for a terminal, largest cost first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .measure import LARGEST_BATCH
from .result import Profile
from .stages import StageCost


def print_profile(profile: Profile, console: Any) -> None:
    """Everything that was measured and counted, and what a study would take."""
    best, ceilings = profile.best, profile.ceilings
    console.rule(f"{profile.model} on {profile.machine}")
    console.print(
        f"Ceilings measured here: {ceilings.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{ceilings.bandwidth / 1e9:,.1f} GB/s in a copy. A floor is the time that these allow."
    )
    _table(
        console,
        f"One UNet call of {best.batch} samples, by kind of site, per sample",
        ("kind", "sites", "ms", "share", "GFLOP", "GFLOP/s", "MB moved", "floor ms", "of it", "MiB held"),
        _kind_rows(profile),
    )
    console.print(
        'MB moved: weights, inputs and outputs, once. MiB held: the most that one such site holds at once; "other" is '
        "what lies between the sites, and holds what the whole call does."
    )
    _table(
        console,
        "Stages",
        ("stage", "ms", "GFLOP", "GFLOP/s", "MB weights", "floor ms", "peak MiB"),
        _stage_rows(profile),
    )
    _table(console, "Batch size", ("samples", "s a call", "ms a sample", "against 1", "peak MiB"), _batch_rows(profile))
    if profile.batches[-1].batch < LARGEST_BATCH:
        console.print("Larger batches would have taken more than the time allowed: --budget SECONDS allows more.")
    _print_ideas(profile, console)
    _print_study(profile, console)


def _kind_rows(profile: Profile) -> Iterable[tuple[str, ...]]:
    total = sum(cost.seconds for cost in profile.kinds)
    for cost in sorted(profile.kinds, key=lambda cost: -cost.seconds):
        rate = cost.flops / cost.seconds if cost.seconds else 0.0
        reached = cost.floor / cost.seconds if cost.seconds else 0.0
        yield (
            cost.kind,
            str(cost.sites or "-"),
            f"{1e3 * cost.seconds:,.2f}",
            f"{cost.seconds / total:.0%}",
            f"{cost.flops / 1e9:,.2f}",
            f"{rate / 1e9:,.0f}",
            f"{cost.moved / 1e6:,.1f}",
            f"{1e3 * cost.floor:,.2f}",
            f"{reached:.0%}",
            _mega(cost.held, 2**20),
        )


def _stage_rows(profile: Profile) -> Iterable[tuple[str, ...]]:
    flops, best = sum(cost.flops for cost in profile.kinds), profile.best
    floor = sum(cost.floor for cost in profile.kinds)
    unet = StageCost("UNet, a sample", best.per_sample, flops, profile.unet_weights, best.peak_bytes, floor)
    for stage in (unet, *profile.stages):
        yield (
            stage.stage,
            f"{1e3 * stage.seconds:,.2f}",
            f"{stage.flops / 1e9:,.2f}",
            f"{stage.flops / stage.seconds / 1e9:,.0f}",
            _mega(stage.weights, 1e6),
            f"{1e3 * stage.floor:,.2f}",
            _mega(stage.peak_bytes, 2**20),
        )


def _batch_rows(profile: Profile) -> Iterable[tuple[str, ...]]:
    for point in profile.batches:
        marks = " (best)" if point is profile.best else ""
        gain = profile.batches[0].per_sample / point.per_sample
        yield (
            f"{point.batch}{marks}",
            f"{point.seconds:.3f}",
            f"{1e3 * point.per_sample:,.2f}",
            f"{gain:.2f}x",
            _mega(point.peak_bytes, 2**20),
        )


def _print_ideas(profile: Profile, console: Any) -> None:
    """Each of the engine's ideas by itself, in the measure in which it saves."""
    free, forced, grid = profile.savings
    pair = min(profile.batches, key=lambda point: abs(point.batch - 2))
    text = profile.text_sweep
    sweeps = (("free", free), ("teacher-forced", forced), ("site x step", grid))
    joined = ", ".join(f"{name} {sweep.shared / sweep.planned:.2f}x" for name, sweep in sweeps)
    batched = pair.per_sample / profile.best.per_sample
    rows = [
        ("any mix of patches shares a batch", "time of a UNet row", f"{batched:.2f}x"),
        ("clean is a row of the batch", "memory of a cache", f"{profile.cache_bytes / 2**20:,.0f} MiB"),
        ("clean and corrupted run once", "UNet forwards", f"{free.common / free.shared:.2f}x"),
        ("rows join at their site and step", "UNet forwards", joined),
        ("rows join at their layer and token", "operations of a text sweep", f"{text.shared / text.planned:.2f}x"),
        ("a text's keys and values once", "operations of a UNet call", f"{profile.text_share:.1%}"),
    ]
    _table(console, "What each idea saves here", ("idea", "saves", "by"), rows)
    if profile.overhead is None:
        console.print("What patching adds to a batch was not measured: a call takes too long for the time allowed.")
    else:
        count, share = profile.overhead.rows, profile.overhead.share
        console.print(f"Patching {count} runs at {count} sites: {share:+.1%} beside as many runs without a patch.")


def _print_study(profile: Profile, console: Any) -> None:
    text = profile.text_sweep
    rows = [
        (
            f"{saving.sweep}, {saving.runs:,} runs",
            f"{saving.common:,}",
            f"{saving.shared:,}",
            f"{saving.planned:,.0f}",
            f"{saving.common / saving.planned:.1f}x",
            f"{saving.memory_bytes / 2**20:,.0f}",
            _duration(profile.study_seconds(saving)),
        )
        for saving in profile.savings
    ]
    _table(
        console,
        "Sweeps of the UNet's sites: forwards of one sample, for one prompt and seed",
        ("sweep", "three runs a patch", "clean, corrupted once", "planned", "saved", "MiB", "study"),
        rows,
    )
    _table(
        console,
        "Sweep of the text encoder: TFLOP, for one prompt and noise sample",
        ("sweep", "three runs a patch", "clean, corrupted once", "planned", "saved", "study"),
        [
            (
                f"{text.runs:,} (site, token)",
                f"{text.common:,.2f}",
                f"{text.shared:,.2f}",
                f"{text.planned:,.3f}",
                f"{text.common / text.planned:.1f}x",
                _duration(profile.prompts * text.seconds),
            )
        ],
    )
    console.print(
        f'"study": expected time of {profile.prompts} prompts x {profile.seeds} seeds x {profile.steps} steps, at '
        f"{1e3 * profile.best.per_sample:,.2f} ms a sample and pictures included; the text sweep without pictures, "
        f"scaled from {text.sampled} runs."
    )


def _table(console: Any, title: str, columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _mega(number: float | None, unit: float) -> str:
    return "-" if number is None else f"{number / unit:,.1f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
