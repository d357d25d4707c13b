"""A profile: what it holds, and as a picture and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .ceilings import Ceilings
from .measure import BatchPoint, KindCost
from .overhead import Overhead
from .savings import Saving
from .stages import StageCost
from .text_sweep import TextSweep


@dataclass(frozen=True)
class Profile:
    """What tracing a pipeline costs on this machine.

    Attributes:
        model: name as given.
        machine: device and dtype.
        ceilings: measured here.
        kinds: cost of a UNet call by kind of site, per sample.
        batches: cost by batch size.
        unet_weights: bytes of its parameters.
        stages: cost of a prompt's encoding and of a picture's decoding.
        savings: forwards of three sweeps of the chosen sites, for one prompt and seed.
        text_share: share of a UNet call's operations that the text's keys and values would take at every step.
        text_sweep: of the text encoder, beside the chosen sites.
        overhead: of patching, or ``None`` where it would have taken too long to measure.
        steps, prompts, seeds: of the study that is estimated.
    """

    model: str
    machine: str
    ceilings: Ceilings
    kinds: list[KindCost]
    batches: list[BatchPoint]
    unet_weights: int
    stages: list[StageCost]
    savings: list[Saving]
    text_share: float
    text_sweep: TextSweep
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
        text, picture = (stage.seconds for stage in self.stages)
        return groups * saving.planned * self.best.per_sample + 2 * self.prompts * text + pictures * picture

    @property
    def cache_bytes(self) -> int:
        """What a cache of a clean run would hold: every site's value at every step, conditional branch."""
        return self.steps * sum(cost.values for cost in self.kinds)

    def save(self, folder: Path) -> None:
        """``profile.json`` and ``profile.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        plot(self, folder / "profile.png")


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
    right.set_xticks([p.batch for p in profile.batches], [str(p.batch) for p in profile.batches])
    right.set_ylim(bottom=0)
    right.set_xlabel("samples in a call")
    right.set_ylabel("ms a sample")
    right.set_title("What a larger batch saves")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{profile.model} on {profile.machine}")
    figure.savefig(path, dpi=150)
