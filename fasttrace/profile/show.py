"""A profile as tables, a picture and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ceilings import Ceilings
from .measure import BatchPoint, KindCost
from .overhead import Overhead
from .savings import Saving


@dataclass(frozen=True)
class Profile:
    """What tracing a pipeline costs on this machine.

    Attributes:
        model: name as given.
        machine: device and dtype.
        ceilings: measured here.
        kinds: cost of a UNet call by kind of site, per sample.
        batches: cost by batch size.
        stages: seconds of a prompt's encoding and a picture's decoding.
        savings: forwards of three sweeps of the chosen sites, for one prompt and seed.
        overhead: of patching, or ``None`` where it would have taken too long to measure.
        steps, prompts, seeds: of the study that is estimated.
    """

    model: str
    machine: str
    ceilings: Ceilings
    kinds: list[KindCost]
    batches: list[BatchPoint]
    stages: dict[str, float]
    savings: list[Saving]
    overhead: Overhead | None
    steps: int
    prompts: int
    seeds: int

    @property
    def best(self) -> BatchPoint:
        """The measured batch size that takes least time a sample."""
        return min(self.batches, key=lambda point: point.per_sample)

    def study_seconds(self, saving: Saving) -> float:
        """Expected seconds of a study: its forwards at the best batch size, its texts and its pictures."""
        groups = self.prompts * self.seeds
        pictures = 0 if "teacher" in saving.sweep else groups * (saving.runs + 2)
        texts = 2 * self.prompts * self.stages["text encoder"]
        return groups * saving.planned * self.best.per_sample + texts + pictures * self.stages["VAE decoder"]

    def save(self, folder: Path) -> None:
        """``profile.json`` and ``profile.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        plot(self, folder / "profile.png")


def print_profile(profile: Profile, console: Any) -> None:
    """Tables of rich, largest cost first."""
    from rich.table import Table

    best, ceilings = profile.best, profile.ceilings
    console.rule(f"{profile.model} on {profile.machine}")
    console.print(
        f"Ceilings measured here: {ceilings.flops / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{ceilings.bandwidth / 1e9:,.1f} GB/s in a copy."
    )
    table = Table(title=f"One UNet call of {best.batch} samples, by kind of site, per sample")
    for name in ("kind", "sites", "ms", "share", "GFLOP", "GFLOP/s", "floor ms", "of the ceiling"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    total = sum(cost.seconds for cost in profile.kinds)
    for cost in sorted(profile.kinds, key=lambda cost: -cost.seconds):
        rate = cost.flops / cost.seconds if cost.seconds else 0.0
        reached = cost.floor / cost.seconds if cost.seconds else 0.0
        table.add_row(
            cost.kind,
            str(cost.sites or "-"),
            f"{1e3 * cost.seconds:,.2f}",
            f"{cost.seconds / total:.0%}",
            f"{cost.flops / 1e9:,.2f}",
            f"{rate / 1e9:,.0f}",
            f"{1e3 * cost.floor:,.2f}",
            f"{reached:.0%}",
        )
    console.print(table)
    table = Table(title="Batch size")
    for name in ("samples", "s a call", "ms a sample", "against 1"):
        table.add_column(name, justify="right")
    for point in profile.batches:
        gain = profile.batches[0].per_sample / point.per_sample
        marks = " (best)" if point is best else ""
        table.add_row(f"{point.batch}{marks}", f"{point.seconds:.3f}", f"{1e3 * point.per_sample:,.2f}", f"{gain:.2f}x")
    console.print(table)
    _print_savings(profile, console)


def _print_savings(profile: Profile, console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"Sweeping {profile.savings[0].runs} sites, one prompt and seed: UNet forwards of one sample")
    for name in ("sweep", "three runs a patch", "clean, corrupted once", "planned", "saved", "study"):
        table.add_column(name, justify="left" if name == "sweep" else "right")
    for saving in profile.savings:
        table.add_row(
            saving.sweep,
            f"{saving.common:,}",
            f"{saving.shared:,}",
            f"{saving.planned:,.0f}",
            f"{saving.common / saving.planned:.1f}x",
            _duration(profile.study_seconds(saving)),
        )
    console.print(table)
    console.print(
        f'"study": expected time of {profile.prompts} prompts x {profile.seeds} seeds x {profile.steps} steps at '
        f"{1e3 * profile.best.per_sample:,.2f} ms a sample, pictures included. "
        + ", ".join(f"{name} {1e3 * seconds:,.1f} ms" for name, seconds in profile.stages.items())
        + "."
    )
    if profile.overhead is None:
        console.print("What patching adds to a batch was not measured: a call takes too long for the time allowed.")
    else:
        rows, share = profile.overhead.rows, profile.overhead.share
        console.print(f"Patching {rows} runs at {rows} sites: {share:+.1%} beside as many runs without a patch.")


def plot(profile: Profile, path: Path) -> None:
    """Time by kind beside its floor, and time a sample by batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    kinds = sorted(profile.kinds, key=lambda cost: cost.seconds)
    places = range(len(kinds))
    left.barh(places, [1e3 * cost.seconds for cost in kinds], color="#9ecae1", label="measured")
    left.barh(places, [1e3 * cost.floor for cost in kinds], height=0.35, color="#08519c", label="floor at the ceilings")
    left.set_yticks(places, [cost.kind for cost in kinds])
    left.set_xlabel(f"ms a sample, batch of {profile.best.batch}")
    left.set_title("Where the time of a UNet call goes")
    left.legend(frameon=False)
    right.plot([p.batch for p in profile.batches], [1e3 * p.per_sample for p in profile.batches], "o-", color="#08519c")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("samples in a call")
    right.set_ylabel("ms a sample")
    right.set_title("What a larger batch saves")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{profile.model} on {profile.machine}")
    figure.savefig(path, dpi=150)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
