"""Reports: a folder that a reviewer can check, made from the table and the record alone.

========================  ============================================================================================
file                      holds
========================  ============================================================================================
``index.html``            everything on one page: words, figures, tables, the record
``*.png``                 the figures, one set for each metric
``*.csv``                 the tables, in full: ``prompts``, and for each metric ``rank``, ``kinds``, ``normalized``
``effects.parquet``       the table of effects, and ``study.json`` the record beside it
``report.json``           the names of all these: what the next report here replaces, and nothing else
========================  ============================================================================================
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from .. import plot
from ..errors import StudyError
from ..findings.findings import Findings
from ..findings.folder import read_json, temporary_beside, write_json
from ..findings.summary import summarize
from . import page
from .pictures import draw_pictures

PAGE, MANIFEST = "index.html", "report.json"


def report(
    effects: Findings | str | Path, out: str | Path | None = None, *, pictures: str | Path | None = None
) -> Path:
    """Write a report.

    Args:
        effects: what to report, or the folder of a finished run, whose pictures are then shown too.
        out: folder of the report; ``report`` within the run's folder if not given. An earlier report there is replaced,
            file by file: what it did not write stays.
        pictures: folder of pictures with their ``index.json``, for effects that are not in a run's folder.

    Returns:
        The path of ``index.html``.

    Raises:
        StudyError: no finished run, no ``out`` for effects in memory, or an ``out`` that holds something else.
    """
    if not isinstance(effects, Findings):
        folder = Path(effects)
        effects = Findings.load(folder)
        out = folder / "report" if out is None else out
        pictures = folder / "pictures" if pictures is None else pictures
    if out is None:
        raise StudyError("a report of effects in memory needs a folder: give out=")
    target = Path(out)
    earlier = _earlier(target)
    draft = temporary_beside(target)
    draft.mkdir(parents=True)
    try:
        _write(effects, draft, None if pictures is None else Path(pictures))
        names = sorted(path.name for path in draft.iterdir())
        write_json(draft / MANIFEST, names)
        target.mkdir(exist_ok=True)
        for name in [*names, MANIFEST]:
            os.replace(draft / name, target / name)
        for name in earlier - set(names):
            (target / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target / PAGE


def _earlier(target: Path) -> set[str]:
    """Names of the files of an earlier report in a folder; none where there is nothing yet."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return set()
    names = read_json(target / MANIFEST) if (target / MANIFEST).is_file() else None
    if not isinstance(names, list) or any(not isinstance(name, str) or name != Path(name).name for name in names):
        raise StudyError(f"{str(target)!r} holds something other than a report: choose another folder")
    return set(names)


def _write(effects: Findings, folder: Path, pictures: Path | None) -> None:
    effects.save(folder)
    sections = [page.words("What was found", summarize(effects))]
    if pictures is not None and (grids := draw_pictures(effects, pictures, folder)):
        sections.append(page.figures("What it looks like", grids))
    for title, name, one in _parts(effects):
        figures = [plot.heatmap(one, folder / f"{name}-heatmap.png").name]
        if one.table["kind"].nunique() > 1 or one.table["layer"].nunique() > 1:
            figures.append(plot.profile(one, folder / f"{name}-profile.png").name)
        figures.append(plot.ranked(one, folder / f"{name}-ranked.png").name)
        sections.append(page.figures(title, figures))
        for heading, kind, table in _tables(one):
            table.to_csv(folder / f"{name}-{kind}.csv", index=False)
            sections.append(page.table(heading, table, f"{name}-{kind}.csv"))
    prompts = _prompts(effects)
    prompts.to_csv(folder / "prompts.csv", index=False)
    sections.append(page.table("Prompts and their baselines", prompts, "prompts.csv"))
    sections.append(page.record(effects.record))
    (folder / PAGE).write_text(page.document(effects, sections), encoding="utf-8")


def _parts(effects: Findings) -> Iterator[tuple[str, str, Findings]]:
    """Title, file name and rows of each part: one metric, and one setting of all else that effects depend on."""
    columns = effects.meaning()
    used: list[str] = []
    for values in effects.table[columns].drop_duplicates().itertuples(index=False, name=None):
        pairs = dict(zip(columns, values, strict=True))
        rest = "".join(f", {column} {value}" for column, value in pairs.items() if column != "metric")
        name = "-".join("".join(c if c.isalnum() or c == "_" else "-" for c in str(value)) for value in values)
        used.append(name.strip("-")[:80])
        again = used.count(used[-1])  # metrics of two folders may have one name in so many characters
        yield f"{pairs['metric']}{rest}", used[-1] if again == 1 else f"{used[-1]}-{again}", effects.where(**pairs)


def _tables(effects: Findings) -> Iterator[tuple[str, str, pd.DataFrame]]:
    keys = ["site", "kind", "layer"]
    if effects.table["token_role"].nunique() > 1:
        keys.append("token_role")
    if effects.table["step_start"].nunique() > 1 or effects.table["step_stop"].nunique() > 1:
        keys += ["step_start", "step_stop"]
    ranked = effects.rank(by=keys)
    yield "Sites by average indirect effect", "rank", ranked
    by_kind = ["attribute", "kind"] if effects.table["attribute"].nunique() > 1 else ["kind"]
    yield "Mean effect of one site, by kind", "kinds", effects.aie(by=by_kind)
    normalized = ranked[[*keys, "rank"]].merge(effects.normalized(by=keys), on=keys, sort=False)
    yield "Normalised effects: 0 is the corrupted run, 1 the clean run", "normalized", normalized.drop(columns="rank")


def _prompts(effects: Findings) -> pd.DataFrame:
    keys = ["prompt_id", "prompt", "subject", "attribute", "metric"]
    means = effects.table.groupby(keys, sort=False)[["clean", "corrupted", "total_effect"]].mean()
    means["seeds"] = effects.table.groupby(keys, sort=False)["seed"].nunique()
    return means.reset_index()
