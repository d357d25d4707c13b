"""Bars of the strongest sites or groups with their intervals: for tables that mix parts, kinds, windows or sets."""

from __future__ import annotations

from typing import Any

from ..findings.findings import Findings
from ..findings.wording import KIND_NAMES
from . import style

SHOWN = 20


def draw_ranked(fig: Any, effects: Findings) -> None:
    """One bar a site, strongest first, at most `SHOWN` of them; whiskers are 95% intervals over prompts."""
    several = effects.table["token_role"].nunique() > 1
    table = effects.rank(by=["site", "kind", "token_role"] if several else ["site", "kind"])
    base = effects.table["base"].iloc[0]
    marks = style.baselines(base, float(table["total_effect"].mean()))
    shown = table.head(SHOWN)
    axis = fig.subplots()
    y = range(len(shown))
    colors = [style.COLORS.get(kind, style.MUTED) for kind in shown["kind"]]
    axis.barh(y, shown["aie"], color=colors, height=0.72, zorder=3)
    if shown["low"].notna().any():
        axis.hlines(y, shown["low"], shown["high"], color=style.INK, linewidth=0.9, alpha=0.7, zorder=4)
    roles = shown["token_role"].str.replace("_", " ") if several else [""] * len(shown)
    axis.set_yticks(y, [f"{site}  {role}".strip() for site, role in zip(shown["site"], roles, strict=True)])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.axvline(0, color=style.MUTED, linewidth=0.9)
    for name, value in marks.items():
        if name != base:
            axis.axvline(value, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axis.set_xlabel(style.effect_label(base), fontsize=9.5)
    for kind in dict.fromkeys(shown["kind"]):
        axis.plot([], [], color=style.COLORS.get(kind, style.MUTED), linewidth=6, label=KIND_NAMES.get(kind, kind))
    # Beside the bars, so that it never lies over one, or over the line of the other run.
    axis.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=style.INK)
    style.plain(axis, grid="x")
