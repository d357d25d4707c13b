"""What was found, on the terminal: a table of the strongest effects, and the summary in words."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..findings.findings import Findings
from ..findings.summary import summarize
from ..findings.wording import KIND_NAMES, number

SHOWN = 8


def show_effects(effects: Findings, console: Any, shown: int = SHOWN) -> None:
    """Print the strongest effects in the first metric, and the summary.

    Args:
        effects: the table.
        console: of rich.
        shown: how many.
    """
    if effects.meaning() == ["metric"]:
        console.print(ranking(effects.where(metric=effects.table["metric"].iloc[0]), shown))
    console.print()
    console.print(summarize(effects), highlight=False, markup=False)


def ranking(effects: Findings, shown: int) -> Any:
    """A rich table of the strongest effects of one metric."""
    from rich.table import Table

    keys = ["site", "kind"]
    if effects.table["token_role"].nunique() > 1:
        keys.append("token_role")
    if effects.table["step_start"].nunique() > 1 or effects.table["step_stop"].nunique() > 1:
        keys += ["step_start", "step_stop"]
    ranked = effects.rank(by=keys)
    metric = str(ranked["metric"].iloc[0])
    table = Table(title=f"strongest effects, {metric}", title_justify="left", title_style="bold", header_style="bold")
    sure = bool(ranked["low"].notna().any())
    for name in ("rank", *keys, "effect", "of total", *(("95% interval", "tied with first") if sure else ())):
        table.add_column(name.replace("_", " "), justify="left" if name in keys else "right", overflow="fold")
    for _, row in ranked.head(shown).iterrows():
        share = "" if pd.isna(row["share"]) else f"{100 * row['share']:.0f}%"
        names = [KIND_NAMES.get(str(row[key]), str(row[key])) if key == "kind" else str(row[key]) for key in keys]
        cells = [str(row["rank"]), *names, number(row["aie"]), share]
        if sure:
            cells += [f"{number(row['low'])} to {number(row['high'])}", "yes" if row["tied_with_first"] else "no"]
        table.add_row(*cells)
    return table
