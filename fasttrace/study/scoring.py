"""Scores of a group's runs, and the rows of the table that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ..findings.table import COLUMNS
from ..metrics.metrics import RunBatch
from ..pipeline import decode_latents
from .axes import step_span
from .groups import Group
from .job import Traced
from .settings import Settings

Scores = npt.NDArray[np.float64]

# Runs scored at once; their pictures are held together.
_BATCH = 64


def score(study: Settings, traced: Traced) -> Scores:
    """Scores ``[metrics, 2 + n]`` of a piece: clean, corrupted, then its ``n`` runs."""
    batches = [
        [metric.score(batch).numpy().astype(np.float64) for metric in study.resolved_metrics]
        for batch in _batches(study, traced)
    ]
    return np.concatenate([np.stack(scores) for scores in batches], axis=1)


def _batches(study: Settings, traced: Traced) -> Iterator[RunBatch]:
    prompt = traced.piece.group.plan.prompt
    text = prompt.target if study.scored_text == "target" else prompt.text
    needs = {metric.needs for metric in study.resolved_metrics}
    count = 2 + len(traced.piece.runs)
    for start in range(0, count, _BATCH):
        rows = slice(start, min(start + _BATCH, count))
        latents = outputs = None
        if traced.trace is not None and study.protocol == "free":
            latents = _rows(traced, rows)
        elif traced.trace is not None:
            outputs = _rows(traced, rows)
        yield RunBatch(
            prompts=[str(text)] * (rows.stop - rows.start),
            images=decode_latents(study.pipe, latents) if "images" in needs and latents is not None else None,
            latents=latents,
            clean_latents=None if latents is None or traced.trace is None else traced.trace.clean,
            text=_text(traced, rows) if "text" in needs else None,
            clean_text=traced.states.clean.embeds,
            outputs=outputs,
            clean_outputs=None if outputs is None or traced.trace is None else traced.trace.clean,
            timesteps=None if outputs is None else _timesteps(study),
            inputs=None if traced.trace is None else traced.trace.inputs,
        )


def _rows(traced: Traced, rows: slice) -> Tensor:
    """Some of the rows clean, corrupted, restored of a trace."""
    trace = traced.trace
    assert trace is not None
    ends = torch.stack([trace.clean, trace.corrupted])
    return torch.cat([ends[rows], trace.restored[max(0, rows.start - 2) : max(0, rows.stop - 2)]])


def _text(traced: Traced, rows: slice) -> Tensor:
    group, states = traced.piece.group, traced.states
    ends = torch.stack([states.clean.embeds, states.corrupted[group.noise_sample].embeds])
    chosen = traced.piece.runs[max(0, rows.start - 2) : max(0, rows.stop - 2)]
    texts = [group.plan.text_of[index] for index in chosen]
    return torch.cat([ends[rows], states.restored[group.noise_sample, texts]])


def _timesteps(study: Settings) -> Tensor:
    from ..engine.schedule import new_scheduler

    timesteps: Tensor = new_scheduler(
        study.traced_pipe.scheduler, study.num_inference_steps, torch.device("cpu")
    ).timesteps
    return timesteps


def table_rows(study: Settings, group: Group, scores: Scores) -> pd.DataFrame:
    """The rows of one group.

    Args:
        study: the study.
        group: the group.
        scores: ``[metrics, 2 + n]``: clean, corrupted, and the ``n`` distinct runs of the plan.

    Returns:
        One row a (run, metric), with the columns of `fasttrace.findings.table.COLUMNS`. ``total_effect`` is
        clean - corrupted.
        ``indirect_effect`` is restored - base: what the patch changed in the run that it was applied to. That is
        restored - corrupted in restoring; in noising (``base="clean"``) restored - clean, negative where a site is
        needed. Both baselines stand in every row.
    """
    plan, prompt = group.plan, group.plan.prompt
    base = 0 if study.base == "clean" else 1
    where = np.array([base if same < 0 else 2 + same for same in plan.same_as], dtype=int)
    rows = [
        (
            run.site_set.label, run.site_set.part, run.site_set.kind, run.site_set.layer, run.position, run.token,
            run.token_role, *step_span(run.steps, study.step_count),
        )
        for run in plan.runs
    ]  # fmt: skip
    names = ["site", "part", "kind", "layer", "position", "token", "token_role", "step_start", "step_stop"]
    runs = pd.DataFrame(rows, columns=names).astype({"position": "Int64"})
    tables = []
    for metric, values in zip(study.resolved_metrics, scores, strict=True):
        table = runs.assign(
            prompt_id=prompt.id, prompt=prompt.text, attribute=prompt.attribute, subject=prompt.subject,
            seed=group.seed, noise_sample=group.noise_sample, branch=study.branch, base=study.base,
            source=study.source, protocol=study.protocol, metric=metric.name, clean=values[0], corrupted=values[1],
            restored=values[where],
        )  # fmt: skip
        table["total_effect"] = table["clean"] - table["corrupted"]
        table["indirect_effect"] = table["restored"] - values[base]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)[list(COLUMNS)]


@dataclass
class GroupScores:
    """A group's scores and latents as its pieces come."""

    scores: list[Scores]
    latents: list[Tensor]

    def add(self, study: Settings, traced: Traced, keep_latents: bool) -> None:
        skip = 0 if traced.piece.first else 2
        self.scores.append(score(study, traced)[:, skip:])
        if keep_latents and traced.trace is not None and study.protocol == "free":
            self.latents.append(_rows(traced, slice(skip, 2 + len(traced.piece.runs))).to("cpu", torch.float16))
