"""Screening a study before it is run: only its clean and corrupted runs, to drop pairs that cannot show anything."""

from __future__ import annotations

import dataclasses

from tqdm.auto import tqdm

from ..errors import StudyError
from .job import Job, Options
from .plan import Plan, PromptPlan
from .scoring import score
from .screening import Screening, screening
from .study import Study


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
        for traced in Job(plan, Options(engine, max_batch)).trace(groups, lambda _: None):
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
