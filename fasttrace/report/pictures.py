"""Picture grids of a report: what a run kept in its ``pictures/``, with scores from the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import plot
from ..errors import StudyError
from ..findings.findings import Findings
from ..findings.folder import read_json
from ..findings.wording import site_label, steps_label, unit
from ..plot.style import COLORS, INK, MUTED

ROWS_A_GRID, GRIDS = 8, 4


def draw_pictures(effects: Findings, source: Path, folder: Path) -> list[str]:
    """Write ``pictures-1.png`` and so on: a row for each (prompt, seed, noise sample), at most `GRIDS` grids.

    Args:
        effects: the table.
        source: folder of pictures with their ``index.json``.
        folder: where the grids go.

    Returns:
        Names of the files; none if the run kept no pictures.

    Raises:
        StudyError: the index names a picture that is not there.
    """
    if not (source / "index.json").is_file():
        return []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in read_json(source / "index.json"):
        groups.setdefault((entry["prompt_id"], entry["prompt"], entry["seed"], entry["noise_sample"]), []).append(entry)
    samples = len({key[3] for key in groups})
    rows = []
    for (_, prompt, seed, sample), entries in list(groups.items())[: ROWS_A_GRID * GRIDS]:
        label = f"{_wrapped(prompt)}\nseed {seed}" + (f", noise {sample}" if samples > 1 else "")
        rows.append((label, [_picture(effects, source, entry) for entry in entries]))
    metric = effects.table["metric"].iloc[0]
    names = []
    for number, start in enumerate(range(0, len(rows), ROWS_A_GRID), start=1):
        path = plot.picture_grid(
            rows[start : start + ROWS_A_GRID],
            folder / f"pictures-{number}.png",
            title="Clean, corrupted, and restored at the strongest and weakest sites",
            explanation=f"Under each picture its score: {metric}, {unit(metric)}.",
        )
        names.append(path.name)
    return names


def _picture(effects: Findings, source: Path, entry: dict[str, Any]) -> plot.Picture:
    file = source / Path(entry["file"]).name
    if not file.is_file():
        raise StudyError(f"{file} is listed in index.json but not there: run the study again")
    image = np.asarray(Image.open(file).convert("RGB"))
    table = effects.table
    rows = table[(table["metric"] == entry.get("metric", table["metric"].iloc[0]))]
    for column in ("prompt_id", "seed", "noise_sample"):
        rows = rows[rows[column] == entry[column]]
    role = entry["role"]
    if role in ("clean", "corrupted"):
        score = float(rows[role].iloc[0]) if len(rows) else None
        return plot.Picture(image, role, score, INK if role == "clean" else MUTED)
    for column in ("site", "token_role", "step_start", "step_stop", "position"):
        if entry.get(column) is not None:
            rows = rows[rows[column] == entry[column]]
    first = rows.iloc[0]
    label = site_label(str(first["site"]), str(first["kind"]), int(first["layer"]), str(first["token_role"]))
    if table["step_start"].nunique() > 1 or table["step_stop"].nunique() > 1:
        label += f"\n{steps_label(int(first['step_start']), int(first['step_stop']))}"
    title = f"{role} {entry['rank']}\n{label}"
    return plot.Picture(image, title, float(first["restored"]), COLORS.get(str(first["kind"]), MUTED))


def _wrapped(text: str, width: int = 24) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])
