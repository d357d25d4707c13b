"""Which (prompt, seed) pairs are worth tracing: those that the model draws well, and that the noise disturbs.

A pair whose clean picture does not show its prompt has nothing to restore; one whose corrupted picture still does has
nothing that was lost. Both are dropped by stated thresholds, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..errors import StudyError
from .groups import PromptPlan
from .job import Job, Options
from .plan import Plan
from .scoring import score
from .study import Study


@dataclass(frozen=True)
class PairScore:
    """Scores of one (prompt, seed), averaged over noise samples."""

    prompt_id: str
    seed: int
    clean: float
    corrupted: float


@dataclass(frozen=True)
class Screening:
    """Pairs and the thresholds that they were held to.

    Attributes:
        metric: what was scored.
        min_clean: pairs whose clean score is below it are dropped; ``None`` drops none.
        max_corrupted: pairs whose corrupted score is above it are dropped; ``None`` drops none.
        pairs: all pairs.
    """

    metric: str
    min_clean: float | None
    max_corrupted: float | None
    pairs: tuple[PairScore, ...]

    @property
    def low_clean(self) -> list[PairScore]:
        return [] if self.min_clean is None else [pair for pair in self.pairs if pair.clean < self.min_clean]

    @property
    def high_corrupted(self) -> list[PairScore]:
        """Pairs that the noise left too good, without those that are dropped for their clean score."""
        if self.max_corrupted is None:
            return []
        low = set(self.low_clean)
        return [pair for pair in self.pairs if pair.corrupted > self.max_corrupted and pair not in low]

    @property
    def kept(self) -> list[PairScore]:
        dropped = {*self.low_clean, *self.high_corrupted}
        return [pair for pair in self.pairs if pair not in dropped]

    def apply(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table of effects whose pair is kept."""
        kept = {(pair.prompt_id, pair.seed) for pair in self.kept}
        pairs = zip(table["prompt_id"], table["seed"], strict=True)
        return table[[(str(one), int(seed)) in kept for one, seed in pairs]].reset_index(drop=True)

    def summary(self) -> str:
        """Counts, as text."""
        lines = [f"{len(self.kept)} of {len(self.pairs)} (prompt, seed) pairs kept, by {self.metric}"]
        if self.min_clean is not None:
            lines.append(f"{len(self.low_clean)} dropped: clean score below {self.min_clean:g}")
        if self.max_corrupted is not None:
            lines.append(f"{len(self.high_corrupted)} dropped: corrupted score above {self.max_corrupted:g}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """For ``study.json``: thresholds, counts, and the pairs that were dropped."""
        return {
            "metric": self.metric,
            "min_clean": self.min_clean,
            "max_corrupted": self.max_corrupted,
            "pairs": len(self.pairs),
            "kept": len(self.kept),
            "low_clean": [[pair.prompt_id, pair.seed] for pair in self.low_clean],
            "high_corrupted": [[pair.prompt_id, pair.seed] for pair in self.high_corrupted],
        }


def screen(
    study: Study,
    *,
    min_clean: float | None = None,
    max_corrupted: float | None = None,
    engine: str = "fast",
    progress: bool = True,
    max_batch: int | None = None,
) -> tuple[Study, Screening]:
    """The study without the (prompt, seed) pairs that its first metric finds unfit, and what was dropped.

    The smaller study keeps the noise of the whole one, and records the screening in ``study.json``.

    Args:
        study: what to screen; its patches are not run.
        min_clean: drop pairs whose clean score is below.
        max_corrupted: drop pairs whose corrupted score, averaged over noise samples, is above.
        engine: as for `fasttrace.run`.
        progress: show a progress bar.
        max_batch: most rows of one UNet call.

    Raises:
        StudyError: no threshold is given, or nothing passes.
    """
    if min_clean is None and max_corrupted is None:
        raise StudyError("screen needs a threshold: give min_clean=, max_corrupted=, or both")
    plan = Plan(study, tuple(PromptPlan(one.prompt, (), (), (), (), ()) for one in study.plan().prompts))
    groups = plan.groups
    scores = []
    with tqdm(total=len(groups), desc="screening", unit="group", disable=not progress) as bar:
        for traced in Job(study, Options(engine, max_batch)).trace(groups, lambda _: None):
            group = traced.piece.group
            clean, corrupted = score(study, traced)[0, :2]
            scores.append((group.plan.prompt.id, group.seed, float(clean), float(corrupted)))
            bar.update()
    found = screening(study.resolved_metrics[0].name, scores, min_clean=min_clean, max_corrupted=max_corrupted)
    if not found.kept:
        raise StudyError(f"screening left no pair: {found.summary()}".replace("\n", "; "))
    seeds: dict[str, list[int]] = {}
    for pair in found.kept:
        seeds.setdefault(pair.prompt_id, []).append(pair.seed)
    prompts = [
        dataclasses.replace(prompt, seeds=tuple(seeds[prompt.id])) for prompt in study.prompts if prompt.id in seeds
    ]
    return dataclasses.replace(study, prompts=prompts, screening=found.record()), found


def screen_table(
    table: pd.DataFrame, metric: str, *, min_clean: float | None = None, max_corrupted: float | None = None
) -> Screening:
    """Screen the pairs of a table of effects.

    Args:
        table: with the columns of `fasttrace.findings.table.COLUMNS`.
        metric: one of its metrics.
        min_clean: as in `Screening`.
        max_corrupted: as in `Screening`.

    Raises:
        StudyError: no such metric.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise StudyError(f"no metric {metric!r} in the table: there are {', '.join(sorted(table['metric'].unique()))}")
    groups = rows.groupby(["prompt_id", "seed", "noise_sample"], sort=True)[["clean", "corrupted"]].first()
    means = groups.groupby(level=["prompt_id", "seed"], sort=True).mean()
    return screening(
        metric,
        (
            (str(one), int(seed), clean, corrupted)
            for (one, seed), clean, corrupted in zip(means.index, means["clean"], means["corrupted"], strict=True)
        ),
        min_clean=min_clean,
        max_corrupted=max_corrupted,
    )


def screening(
    metric: str,
    scores: Iterable[tuple[str, int, float, float]],
    *,
    min_clean: float | None = None,
    max_corrupted: float | None = None,
) -> Screening:
    """Screen pairs given as (prompt id, seed, clean score, corrupted score), one for each noise sample."""
    gathered: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for prompt_id, seed, clean, corrupted in scores:
        gathered.setdefault((prompt_id, seed), []).append((float(clean), float(corrupted)))
    pairs = tuple(
        PairScore(*key, *(sum(column) / len(values) for column in zip(*values, strict=True)))
        for key, values in sorted(gathered.items())
    )
    return Screening(metric, min_clean, max_corrupted, pairs)
