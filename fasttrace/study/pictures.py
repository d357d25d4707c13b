"""Pictures of a finished study: each group's clean and corrupted run, and those at the strongest and weakest sites."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch import Tensor

from ..effects.effects import Effects
from ..findings.folder import write_json
from ..findings.table import Groups
from ..pipeline import decode_latents
from .axes import step_span
from .groups import Group
from .plan import Plan

FOLDER, INDEX = "pictures", "index.json"


def save_pictures(
    folder: Path, effects: Effects, plan: Plan, latents_of: Callable[[Group], Tensor | None], count: int
) -> None:
    """Write ``pictures/*.png`` and their list, ``pictures/index.json``.

    Each entry of the list has ``file``, ``role`` (``clean``, ``corrupted``, ``strongest`` or ``weakest``), ``rank``
    (from 1), ``prompt_id``, ``prompt``, ``seed``, ``noise_sample``; and for restored runs ``site``, ``position``,
    ``token_role``, ``step_start``, ``step_stop``, ``metric`` and ``mean_effect``. Runs are ranked by site, role and
    steps; where a prompt has several tokens of a role, its picture is that of the first.

    Args:
        folder: of the run.
        effects: the whole table; its first metric ranks.
        plan: of the study.
        latents_of: clean, corrupted and the plan's distinct runs of a group, ``[2 + n, C, h, w]``; ``None`` where the
            protocol makes no pictures.
        count: how many strongest, and how many weakest.
    """
    place = folder / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    study = plan.study
    metric = study.resolved_metrics[0].name
    ranked = _ranked(effects.where(metric=metric))
    chosen = [("strongest", rank, ranked.index[rank - 1]) for rank in range(1, min(count, len(ranked)) + 1)]
    left = max(0, min(count, len(ranked) - count))
    chosen += [("weakest", rank, ranked.index[-rank]) for rank in range(1, left + 1)]
    entries: list[dict[str, Any]] = []
    for group in plan.groups:
        latents = latents_of(group)
        if latents is None:
            continue
        own: list[tuple[int, dict[str, Any]]] = [(0, {"role": "clean"}), (1, {"role": "corrupted"})]
        base = 0 if study.base == "clean" else 1
        for role, rank, key in chosen:
            index = next((i for i, run in enumerate(group.plan.runs) if _key(run, study.step_count) == key), None)
            if index is None:
                continue
            run, same = group.plan.runs[index], group.plan.same_as[index]
            start, stop = step_span(run.steps, study.step_count)
            own.append(
                (
                    base if same < 0 else 2 + same,
                    {
                        "role": role, "rank": rank, "site": run.site_set.label, "position": run.position,
                        "token_role": run.token_role, "step_start": start, "step_stop": stop, "metric": metric,
                        "mean_effect": float(ranked[key]),
                    },
                )
            )  # fmt: skip
        images = decode_latents(study.pipe, latents[[row for row, _ in own]])
        for image, (_, entry) in zip(images, own, strict=True):
            name = f"{len(entries):05d}-{entry['role']}.png"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(place / name)
            entries.append(
                {
                    "file": name, "prompt_id": group.plan.prompt.id, "prompt": group.plan.prompt.text,
                    "seed": group.seed, "noise_sample": group.noise_sample, **entry,
                }
            )  # fmt: skip
    if entries:
        write_json(place / INDEX, entries)


_RUN = ["site", "token_role", "step_start", "step_stop"]


def _ranked(effects: Effects) -> pd.Series:
    """Mean effect of every kind of run, strongest first: means over prompts, as in every table of the effects."""
    means = Groups(effects.table, _RUN).frame.set_index(_RUN)["aie"].sort_index()
    return means.sort_values(ascending=effects.direction() < 0, kind="stable")


def _key(run: Any, steps: int) -> tuple[Any, ...]:
    return (run.site_set.label, run.token_role, *step_span(run.steps, steps))
