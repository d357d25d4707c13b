"""``make bench-report``: ``bench/RESULTS.md`` and its plots, from ``bench/results/*.csv`` and nothing else.

Of each case the newest row counts; older ones stay in the CSV. A case is what a row's ``CASE`` columns say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from .record import RESULTS

TARGET = RESULTS.parent / "RESULTS.md"
CASE = (
    *("what", "case", "rival", "method", "site", "attribute", "protocol", "dtype", "kernel", "config", "arch"),
    *("patches", "batch", "steps", "prompts", "tokens", "width", "layer", "edit", "part", "model", "pictures"),
)
PROVENANCE = ("date", "commit", "machine", "threads", "versions")

TITLES = {
    "text": ("Text encoder sweep", "python -m bench.bench_text"),
    "unet": ("UNet sweep", "python -m bench.bench_unet"),
    "edit": ("Closed-form edits", "python -m bench.bench_edit"),
    "backends": ("Backends beside their libraries", "python -m bench.bench_backends"),
    "planner": ("The planner", "python -m bench.bench_planner"),
    "edit_quality": ("What edits do to pictures", "python -m bench.edit_quality"),
    "compile": ("Kernels, compiled and not measured", "make compile-report"),
}

INTRODUCTION = """# Results

Every table is written by `make bench-report` from `bench/results/*.csv`; the command over a table repeats it. Times are
medians of interleaved rounds in one process, ratios are taken round by round: a ratio above 1 means that fasttrace is
faster. A rival that beats it is shown like any other. Absolute times belong to the machine named under the table.
"""


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each case: of rows that agree in every column that says what was measured."""
    said = [name for name in table.columns if name in CASE]
    return table.drop_duplicates(subset=said, keep="last") if said else table


def section(suite: str, table: pd.DataFrame) -> str:
    """A heading, the command, the table, and where it was measured."""
    title, command = TITLES.get(suite, (suite, f"python -m bench.bench_{suite}"))
    shown = newest(table)
    columns = [name for name in shown.columns if name not in PROVENANCE and shown[name].notna().any()]
    lines = [f"## {title}", "", f"`{command}`", "", _markdown(shown[columns]), ""]
    known = [name for name in PROVENANCE if name in shown.columns]
    for origin, rows in shown.groupby(known, dropna=False, sort=False) if known else []:
        where = dict(zip(known, origin, strict=True))
        lines.append(
            f"- {len(rows)} rows: {where.get('date')}, commit {where.get('commit')}, {where.get('machine')}, "
            f"{where.get('versions')}"
        )
    return "\n".join([*lines, ""])


def _markdown(table: pd.DataFrame) -> str:
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    head = [str(name).replace("_", " ") for name in table.columns]
    rule = ["---:" if pd.api.types.is_numeric_dtype(table[name]) else "---" for name in table.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.6g}"
    return str(value).replace("|", "/")


def main(folder: Path = RESULTS, target: Path = TARGET) -> None:
    suites = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    order = [*(name for name in TITLES if name in suites), *(name for name in suites if name not in TITLES)]
    target.write_text("\n".join([INTRODUCTION, *(section(name, suites[name]) for name in order)]))
    print(f"written: {target} ({len(suites)} suites)")


if __name__ == "__main__":
    main()
