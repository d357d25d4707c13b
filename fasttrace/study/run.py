"""Running a study from its plan to its effects, keeping what is finished so that an interrupted run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..effects.effects import Effects
from ..errors import StudyError
from ..findings.folder import PARTIAL, RECORD, read_json
from ..findings.joining import CIRCUMSTANCES
from ..findings.table import canonical_order
from .carried import unknown
from .groups import Group
from .job import Job, Options
from .pictures import save_pictures
from .plan import Plan
from .record import study_record
from .scoring import GroupScores, table_rows
from .store import Shards, check_same, content_hash
from .study import Study


def run(
    study: Study,
    engine: str = "fast",
    out: str | Path | None = None,
    *,
    progress: bool = True,
    max_batch: int | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    pictures: int = 2,
    overwrite: bool = False,
) -> Effects:
    """Run a study and return what it found.

    Args:
        study: what to run.
        engine: ``"fast"``, or ``"oracle"``: plain hooks, one run at a time.
        out: folder for ``effects.parquet``, ``study.json`` and ``pictures/``. A run that was interrupted goes on where
            it stopped, and a finished one is read. Nothing is written if it is ``None``.
        progress: show a progress bar.
        max_batch: most rows of one UNet call; the engine's own choice if not given.
        dtype: what the fast engine's UNet computes in, where not in its own dtype.
        compile: run the fast engine's UNet as a compiled graph where it can.
        pictures: for each group, keep pictures of its clean run, its corrupted run, and this many runs each with the
            strongest and the weakest mean effect; 0 for none.
        overwrite: replace what ``out`` holds.

    Raises:
        StudyError: ``out`` holds another study, or is a file; or it holds results, and whether they are of this study
            cannot be told, since the pipeline or a metric carries something whose state cannot be read.
        NumericsError: a run that is not finite.
    """
    plan, options = study.plan(), Options(engine, max_batch, dtype, compile)
    record = study_record(study) | {"computed": options.record()}
    if out is None:
        return Effects(_table(_Run(plan, options, None, {}), progress), record)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"out={str(out)!r} is a file: expected a folder, or a name for a new one")
    settings = _settings(record)
    if not overwrite:
        _check_known(settings, folder)
    if not overwrite and (folder / RECORD).is_file():
        check_same(_settings(read_json(folder / RECORD)), settings, folder)
        if not (folder / PARTIAL).exists():
            return Effects.load(folder)
    new = not folder.exists()
    shards = Shards(folder, settings, overwrite)
    job = _Run(plan, options, shards, settings)
    try:
        effects = Effects(_table(job, progress), record)
    except BaseException:
        shards.clear_if_empty(and_folder=new)
        raise
    if pictures > 0:
        save_pictures(folder, effects, plan, job.latents, pictures)
    effects.save(folder)
    shards.clear()
    return effects


class _Run:
    """A plan on its way: the job, and what is kept of its groups."""

    def __init__(self, plan: Plan, options: Options, shards: Shards | None, settings: dict[str, Any]) -> None:
        self.plan, self.shards = plan, shards
        self._options, self._settings = options, settings

    def key(self, group: Group) -> str:
        """A name for a group's results: everything that decides them."""
        common = {name: value for name, value in self._settings.items() if name not in ("prompts", "seeds")}
        own = [one for one in self._settings["prompts"] if one["id"] == group.plan.prompt.id]
        return content_hash([common, own, group.seed, group.noise_sample])

    def finished(self, group: Group) -> pd.DataFrame | None:
        return None if self.shards is None else self.shards.rows(self.key(group))

    def latents(self, group: Group) -> Tensor | None:
        return None if self.shards is None else self.shards.latents(self.key(group))

    def results(self, groups: list[Group], bar: Any) -> list[pd.DataFrame]:
        """Run groups, and keep each when its last piece is scored."""
        study, tables = self.plan.study, []
        under_way = GroupScores([], [])
        for traced in Job(self.plan.study, self._options).trace(groups, bar.update):
            under_way.add(study, traced, keep_latents=self.shards is not None)
            if not traced.piece.last:
                continue
            group = traced.piece.group
            tables.append(table_rows(study, group, np.concatenate(under_way.scores, axis=1)))
            if self.shards is not None:
                latents = torch.cat(under_way.latents) if under_way.latents else None
                self.shards.put(self.key(group), tables[-1], latents)
            under_way = GroupScores([], [])
        return tables


def _table(job: _Run, progress: bool) -> pd.DataFrame:
    """The whole table: groups that were finished before are read, the others run."""
    tables, todo, done = [], [], 0
    for group in job.plan.groups:
        rows = job.finished(group)
        if rows is None:
            todo.append(group)
        else:
            tables.append(rows)
            done += len(group.plan.runs)
    with tqdm(total=job.plan.run_count, initial=done, desc="tracing", unit="run", disable=not progress) as bar:
        if todo:
            tables += job.results(todo, bar)
    return canonical_order(pd.concat(tables, ignore_index=True))


def _check_known(settings: dict[str, Any], folder: Path) -> None:
    """Refuse to take over results where something that decides them has no name to be known by."""
    found = unknown(settings["carried"]) or unknown(settings["callables"])
    if found and ((folder / RECORD).is_file() or (folder / PARTIAL).exists()):
        raise StudyError(
            f"{str(folder)!r} holds results, and whether they are this study's cannot be told: the state of {found} "
            "cannot be read; give it an attribute version, choose another folder, or overwrite=True"
        )


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What decides the results. The order of the prompts does not."""
    settings = {name: value for name, value in record.items() if name not in CIRCUMSTANCES}
    return settings | {"prompts": sorted(settings["prompts"], key=lambda prompt: str(prompt["id"]))}
