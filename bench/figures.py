"""The two figures of RESULTS.md: ratios to every rival, and how time and memory grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fasttrace.plot.style import COLORS, INK, MUTED, figure, heading, plain, save

from .fit import power_law

_PANELS = ("patches", "prompts", "tokens", "denoising steps", "model width", "batch size")
_LINES = {
    "text, packed": COLORS["resnet"],
    "UNet, free": COLORS["self_attn"],
    "UNet, teacher-forced": COLORS["cross_attn"],
    "study": COLORS["mlp"],
    "planner": COLORS["hidden"],
}
_FASTER, _SLOWER = COLORS["resnet"], COLORS["self_attn"]


def plot_ratios(suites: Mapping[str, pd.DataFrame], path: Path) -> bool:
    """A bar for each comparison, from the median ratio's 1, with the range over rounds; whether there was one."""
    rows = [
        row
        for table in suites.values()
        if {"what", "rival", "ratio"} <= set(table.columns)
        for row in table.dropna(subset=["rival", "ratio"]).to_dict("records")
    ]
    if not rows:
        return False
    fig = figure(10, 1.2 + 0.42 * len(rows))
    heading(fig, "Times faster than each rival", "Median over interleaved rounds, and the range over them.")
    axis = fig.subplots()
    for place, row in enumerate(reversed(rows)):
        ratio = float(row["ratio"])
        axis.barh(place, ratio - 1, left=1, height=0.62, color=_FASTER if ratio >= 1 else _SLOWER)
        ends = [row.get("ratio_lowest"), row.get("ratio_highest")]
        if not any(pd.isna(end) for end in ends):
            axis.plot(ends, [place, place], color=INK, linewidth=1.2, marker="|", markersize=6)
        right = max([1.0, ratio, *(float(end) for end in ends if not pd.isna(end))])
        axis.annotate(f"{ratio:.3g}", (right, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(range(len(rows)), [f"{row['what']}\n{row['rival']}" for row in reversed(rows)])
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axvline(1, color=INK, linewidth=0.8)
    plain(axis, grid="x")
    axis.tick_params(axis="y", labelsize=7.5, length=0, labelcolor=INK)
    axis.margins(x=0.08, y=0.02)
    save(fig, path)
    return True


def plot_scaling(points: pd.DataFrame, planner: pd.DataFrame | None, path: Path) -> None:
    """Six panels of time above six of memory, each a curve an engine, with its fitted power law."""
    if planner is not None:
        more = planner.rename(columns={"patches": "size"}).assign(engine="planner", against="patches")
        points = pd.concat([points, more.reindex(columns=points.columns)], ignore_index=True)
    fig = figure(11, 11.5)
    heading(
        fig,
        "How time and peak memory grow",
        "Dashed: a power law through the largest four sizes; the number is its exponent. Memory is beside the weights.",
    )
    axes = fig.subplots(4, 3).flatten()
    handles: dict[str, Any] = {}
    for block, (column, unit) in enumerate((("median_s", "seconds"), ("peak_mib", "peak MiB"))):
        for place, against in enumerate(_PANELS):
            axis = axes[6 * block + place]
            for engine, curve in points[points["against"] == against].groupby("engine", sort=False):
                curve = curve.dropna(subset=[column]).sort_values("size")
                if len(curve) > 1:
                    handles[str(engine)] = _curve(axis, list(curve["size"]), list(curve[column]), str(engine))
            _logarithmic(axis)
            axis.set_title(against, fontsize=9.5, color=INK, loc="left")
            axis.set_ylabel(unit, fontsize=8.5)
            plain(axis, grid="both")
    fig.legend(handles.values(), handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    save(fig, path)


def _logarithmic(axis: Any) -> None:
    """Both scales logarithmic, with few round numbers at the ticks, and some where there is less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        one.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        one.set_major_formatter(lambda value, _: f"{value:g}")
        one.set_minor_formatter(NullFormatter())


def _curve(axis: Any, sizes: list[float], values: list[float], engine: str) -> Any:
    color = _LINES.get(engine, MUTED)
    (line,) = axis.plot(sizes, values, "o", color=color, markersize=4)
    axis.plot(sizes, values, color=color, linewidth=0.8, alpha=0.45)
    if min(values) > 0:
        law = power_law(sizes, values)
        ends = [law.low, law.high]
        axis.plot(ends, [law.at(size) for size in ends], "--", color=color, linewidth=1.2)
        axis.annotate(
            f"{law.exponent:.2f}", (law.high, law.at(law.high)), (-4, 6), textcoords="offset points", ha="right",
            fontsize=8.5, color=color,
        )  # fmt: skip
    return line
