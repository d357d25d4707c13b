"""``make bench-report``: ``bench/RESULTS.md`` and its figures, from ``bench/results/*.csv`` and nothing else.

Of each case the newest row counts; older ones stay in the CSV. A case is what a row's ``CASE`` columns say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .figures import plot_ratios, plot_scaling
from .fit import power_law
from .record import RESULTS

TARGET = RESULTS.parent / "RESULTS.md"
CASE = (
    *("what", "case", "rival", "method", "site", "attribute", "protocol", "dtype", "kernel", "config", "arch"),
    *("patches", "batch", "steps", "prompts", "tokens", "width", "layer", "edit", "part", "model", "pictures"),
    *("engine", "against", "size"),
)
PROVENANCE = ("date", "commit", "machine", "threads", "versions")

TITLES = {
    "text": ("Text encoder sweep", "python -m bench.bench_text"),
    "unet": ("UNet sweep", "python -m bench.bench_unet"),
    "unet_floor": ("Where a UNet row's time goes", "python -m bench.bench_unet_floor"),
    "pictures": ("Text sweep to pictures", "python -m bench.bench_pictures"),
    "edit": ("Closed-form edits", "python -m bench.bench_edit"),
    "backends": ("Backends beside their libraries", "python -m bench.bench_backends"),
    "scaling": ("How time and memory grow", "python -m bench.bench_scaling"),
    "planner": ("The planner", "python -m bench.bench_planner"),
    "edit_quality": ("What edits do to pictures", "python -m bench.edit_quality"),
    "compile": ("Kernels, compiled and not measured", "make compile-report"),
}

INTRODUCTION = """# Results

Everything here is written by `make bench-report` from `bench/results/*.csv`; the command over a table repeats it (with
`.venv/bin/python`, which `make bench` sets up), and `make bench-full` all of them but the last two: what edits do to
pictures, and the compiled kernels. `make bench` runs a part of them quickly and records nothing. Times are medians of
interleaved rounds in one process, ratios are taken round by round, with their range in brackets: above 1 means that
fasttrace is faster. A rival that beats it is shown like any other. Contenders are compared with each other before they
are timed; where all of a rival's work would take too long, a part of it is timed and scaled, and the row says which.
Peak memory is what a call holds at most beside weights and inputs, its results included; a rival's is that of the part
that was timed. Absolute times belong to the machine named under the table.
"""

NOTES = {
    "scaling": """Free UNet runs stop at 316, of 820 pairs of sites: each goes through every step, so that 10,000
of them would take minutes a call, and their exponent is near 1 already.""",
}

_FIRST = ("goal", "timed", "median_s", "rival_median_s", "ratio", "peak_mib", "rival_peak_mib")
_RANGES = (("_lowest", "_highest"), ("_low", "_high"))
_LABELS = {
    "median_s": "s",
    "rival_median_s": "rival s",
    "peak_mib": "peak MiB",
    "rival_peak_mib": "rival peak MiB",
    "bare_peak_mib": "bare peak MiB",
    "of_bare": "share of bare rate",
    "timed": "rival timed on",
}


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each case: of rows that agree in every column that says what was measured."""
    said = [name for name in table.columns if name in CASE]
    return table.drop_duplicates(subset=said, keep="last") if said else table


def section(suite: str, table: pd.DataFrame, figure: str = "") -> str:
    """A heading, the command, the tables, and where they were measured."""
    title, command = TITLES.get(suite, (suite, f"python -m bench.bench_{suite}"))
    shown = newest(table)
    lines = [f"## {title}", "", f"`{command}`", "", *([figure, ""] if figure else [])]
    lines += [NOTES[suite], ""] if suite in NOTES else []
    known = [name for name in PROVENANCE if name in shown.columns]
    measured = shown.drop(columns=known)
    for part in _parts(exponents(measured) if suite == "scaling" else measured):
        labels = _LABELS | ({"ratio": "times faster"} if "rival" in part.columns else {})
        lines += [*_common(part), _markdown(_labelled(_varying(part), labels)), ""]
    for origin, rows in shown.groupby(known, dropna=False, sort=False) if known else []:
        where = dict(zip(known, origin, strict=True))
        lines.append(
            f"- {len(rows)} rows: {where.get('date')}, commit {where.get('commit')}, {where.get('machine')}, "
            f"{where.get('versions')}"
        )
    return "\n".join([*lines, ""])


def exponents(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each curve: the largest point, and the exponents over the sizes that are fitted."""
    rows = []
    for (engine, against), curve in points.groupby(["engine", "against"], sort=False):
        curve = curve.sort_values("size")
        laws = {
            name: power_law(list(curve["size"]), list(curve[column]))
            for name, column in (("time", "median_s"), ("memory", "peak_mib"), ("operations", "plan_gflop"))
            if bool((curve[column] > 0).all())
        }
        largest = curve.iloc[-1]
        row = {"what grows": against, "engine": engine}
        row |= {"fitted from": f"{laws['time'].low:g} to {laws['time'].high:g}"}
        row |= {f"exponent of {name}": round(law.exponent, 2) for name, law in laws.items()}
        row |= {f"{name} at the largest": largest[column] for name, column in (("s", "median_s"), ("MiB", "peak_mib"))}
        rows.append(row)
    return pd.DataFrame(rows)


def _parts(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Rows that have the same kind of columns: those without a rival, those with one, and those with a ratio to it."""
    kinds = pd.Series(0, index=table.index)
    for name in ("rival", "ratio"):
        if name in table.columns:
            kinds = 2 * kinds + table[name].notna()
    for _, part in table.groupby(kinds):
        yield part.dropna(axis="columns", how="all")[lambda one: sorted(one, key=_place)]


def _place(column: str) -> int:
    """What was measured first, then how fast it was; the rest as it comes."""
    order = [*CASE, *_FIRST]
    return order.index(column) if column in order else len(order)


def _constant(table: pd.DataFrame) -> list[str]:
    """Columns that say the same of every row, and that are not a measurement."""
    said = [name for name in table.columns[1:] if name in CASE] if len(table) > 1 else []
    return [name for name in said if table[name].nunique(dropna=False) == 1]


def _common(table: pd.DataFrame) -> list[str]:
    said = [f"{name.replace('_', ' ')} {_cell(table[name].iloc[0])}" for name in _constant(table)]
    return [f"In every row: {', '.join(said)}.", ""] if said else []


def _varying(table: pd.DataFrame) -> pd.DataFrame:
    """What is left, with a figure and its range in one column."""
    table = table.drop(columns=_constant(table)).astype(object)
    for name in list(table.columns):
        for low, high in _RANGES:
            if name + low in table.columns and name + high in table.columns:
                ends = zip(table[name], table.pop(name + low), table.pop(name + high), strict=True)
                table[name] = [_with_range(*one) for one in ends]
        if f"{name}_interval" in table.columns:
            pairs = zip(table[name], table.pop(f"{name}_interval"), strict=True)
            table[name] = [f"{_cell(value)} ({interval})" for value, interval in pairs]
    return table


def _with_range(value: Any, low: Any, high: Any) -> str:
    return _cell(value) if pd.isna(low) else f"{_cell(value)} ({_cell(low)} to {_cell(high)})"


def _labelled(table: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    return table.rename(columns=lambda name: labels.get(name, str(name).replace("_", " ")))


def _markdown(table: pd.DataFrame) -> str:
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    numeric = [all(not isinstance(value, str) for value in table[name]) for name in table.columns]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(table.columns), rule, *cells])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.6g}"
    return str(value).replace("|", "/")


def main(folder: Path = RESULTS, target: Path = TARGET) -> None:
    suites = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    order = [*(name for name in TITLES if name in suites), *(name for name in suites if name not in TITLES)]
    latest = {name: newest(suites[name]) for name in order}
    lines = [INTRODUCTION]
    if plot_ratios(latest, target.parent / "ratios.png"):
        lines.append("![Ratios to every rival, with their ranges](ratios.png)\n")
    figures = {}
    if "scaling" in latest:
        plot_scaling(latest["scaling"], latest.get("planner"), target.parent / "scaling.png")
        figures["scaling"] = "![Time and peak memory against what grows, with fitted exponents](scaling.png)"
    target.write_text("\n".join([*lines, *(section(name, suites[name], figures.get(name, "")) for name in order)]))
    print(f"written: {target} ({len(suites)} suites)")


if __name__ == "__main__":
    main()
