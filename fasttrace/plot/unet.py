"""UNet figures: every site in network order, a panel a kind; sites by steps; the profile of each kind by depth."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from ..findings.findings import Findings
from ..findings.table import Groups, network_order
from ..findings.wording import KIND_NAMES, block, number, unet_place
from . import style


def draw_sites(fig: Any, effects: Findings) -> None:
    """One bar a site, in network order from left to right, one panel a kind; whiskers are 95% intervals over prompts.

    The lines are the two baselines: no effect (the run that is patched) and, dashed, the other run.
    """
    effects = effects.where(part="unet")
    table = effects.aie(by=["site", "kind"])
    place = {name: index for index, name in enumerate(sorted(table["site"].unique(), key=network_order))}
    table["x"] = table["site"].map(place)
    base, total = effects.table["base"].iloc[0], _total(effects)
    name, other = next((name, at) for name, at in style.baselines(base, total).items() if name != base)
    kinds = [kind for kind in KIND_NAMES if kind in set(table["kind"])]
    axes = fig.subplots(len(kinds), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for kind, axis in zip(kinds, axes, strict=True):
        part = table[table["kind"] == kind]
        _bands(axis, list(place), labels=axis is axes[0])
        axis.bar(part["x"], part["aie"], width=0.82, color=style.COLORS[kind], zorder=3)
        _whiskers(axis, part["x"], part)
        axis.axhline(0, color=style.MUTED, linewidth=0.9, zorder=2)
        axis.axhline(other, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        top = part.iloc[int(part["aie"].abs().argmax())]
        axis.annotate(
            unet_place(top["site"]), (top["x"], np.nanmax([top["aie"], top["high"], 0])), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=7.5, color=style.INK, zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        axis.set_ylabel(KIND_NAMES.get(kind, kind), fontsize=9.5, color=style.COLORS[kind], fontweight="bold")
        style.plain(axis, grid="y")
        axis.yaxis.label.set_color(style.COLORS[kind])
    low, high = _limits(table, other)
    axes[0].set_ylim(low, high)
    axes[0].set_xlim(-0.6, len(place) - 0.4)
    axes[0].annotate(
        f"{name}: total effect {number(total)}", (0.997, other), xycoords=("axes fraction", "data"), ha="right",
        va="bottom", fontsize=8, color=style.MUTED, zorder=6,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip
    fig.supylabel(style.effect_label(base), fontsize=9.5, color=style.INK)
    axes[-1].set_xticks([])
    axes[-1].set_xlabel("sites in the order in which the UNet runs them →", fontsize=9.5)


def draw_steps(fig: Any, effects: Findings) -> None:
    """Site (down, in network order) by steps (across); one panel a kind, on one scale from corrupted to clean."""
    effects = effects.where(part="unet")
    table = effects.to_pandas()
    cells = Groups(table, ["site", "kind", "step_start", "step_stop"]).frame
    windows = sorted({(int(a), int(b)) for a, b in zip(cells["step_start"], cells["step_stop"], strict=True)})
    names = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in windows]
    total = _total(effects)
    limit, corrupted = max(abs(total), 1e-12), style.baselines(table["base"].iloc[0], total)["corrupted"]
    kinds = [kind for kind in KIND_NAMES if kind in set(cells["kind"])]
    axes = fig.subplots(1, len(kinds), squeeze=False)[0]
    for kind, axis in zip(kinds, axes, strict=True):
        part = cells[cells["kind"] == kind]
        sites = sorted(part["site"].unique(), key=network_order)
        grid = np.full((len(sites), len(windows)), np.nan)
        for _, cell in part.iterrows():
            column = windows.index((int(cell["step_start"]), int(cell["step_stop"])))
            grid[sites.index(cell["site"]), column] = (cell["aie"] - corrupted) * np.sign(total)
        image = axis.imshow(grid, cmap=style.MAPS[kind], vmin=0, vmax=limit, aspect="auto")
        axis.set_title(KIND_NAMES.get(kind, kind), fontsize=10.5, color=style.COLORS[kind], fontweight="bold")
        axis.set_yticks(range(len(sites)), [unet_place(site) for site in sites])
        every = max(1, -(-len(windows) // 10))
        axis.set_xticks(range(0, len(windows), every), names[::every], rotation=0 if len(names[-1]) < 4 else 45)
        axis.set_xlabel("patched denoising steps", fontsize=9.5)
        style.plain(axis)
        axis.tick_params(axis="y", labelsize=7)
        style.scale(fig, image, axis, ["corrupted\n0", f"clean\n{number(total)}"])


def draw_profile(fig: Any, effects: Findings) -> None:
    """Mean effect of a site against depth, one line a kind: UNet blocks or text layers from left to right."""
    table = effects.to_pandas()
    panels = [("UNet", table[table["part"] == "unet"]), ("text encoder", table[table["part"] != "unet"])]
    panels = [(name, part) for name, part in panels if len(part)]
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for (name, part), axis in zip(panels, axes, strict=True):
        unet = name == "UNet"
        depth = part["site"].map(block) if unet else part["part"].astype(str) + " " + part["layer"].astype(str)
        chosen = Findings(part.assign(depth=depth), effects.record)
        order = list(dict.fromkeys(part.assign(d=depth).sort_values("site", key=_network_ranks)["d"]))
        result = chosen.aie(by=["kind", "depth"])
        for kind in [kind for kind in (*KIND_NAMES, "head") if kind in set(result["kind"])]:
            line = result[result["kind"] == kind].set_index("depth")
            line = line.loc[[label for label in order if label in line.index]]  # not every block has every kind
            x = [order.index(label) for label in line.index]
            color, label = style.COLORS[kind], KIND_NAMES.get(kind, kind)
            axis.plot(x, line["aie"], color=color, marker="o", markersize=4, linewidth=1.8, label=label)
            axis.fill_between(x, line["low"], line["high"], color=color, alpha=0.13, linewidth=0)
        axis.axhline(0, color=style.MUTED, linewidth=0.9)
        shown = [label if unet else label.split()[-1] for label in order]
        axis.set_xticks(range(len(order)), shown, rotation=30 if unet and len(order) > 6 else 0)
        axis.set_xlabel("UNet block, in network order" if unet else "text layer", fontsize=9.5)
        axis.set_ylabel("mean indirect effect of one site", fontsize=9.5)
        axis.legend(fontsize=8.5, frameon=False, labelcolor=style.INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        style.plain(axis, grid="y")


def _network_ranks(names: pd.Series) -> pd.Series:
    place = {name: index for index, name in enumerate(sorted(names.unique(), key=network_order))}
    return names.map(place)


def _total(effects: Findings) -> float:
    return float(effects.table.groupby("prompt_id")["total_effect"].mean().mean())


def _bands(axis: Any, sites: list[str], *, labels: bool) -> None:
    """Shade every other UNet block, and name the blocks above the first panel."""
    start = 0
    for count, (name, members) in enumerate(groupby(sites, key=block)):
        stop = start + len(list(members))
        if count % 2 == 0:
            axis.axvspan(start - 0.5, stop - 0.5, color=style.GROUND, zorder=0, linewidth=0)
        if labels:
            narrow = stop - start < 0.035 * len(sites)
            axis.annotate(
                name.replace("down ", "d").replace("up ", "u") if narrow else name,
                ((start + stop - 1) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                fontsize=8.5, color=style.MUTED,
            )  # fmt: skip
        start = stop


def _whiskers(axis: Any, x: pd.Series, part: pd.DataFrame) -> None:
    if part["low"].notna().any():
        axis.vlines(x, part["low"], part["high"], color=style.INK, linewidth=0.8, alpha=0.7, zorder=4)


def _limits(table: pd.DataFrame, other: float) -> tuple[float, float]:
    values = np.concatenate([table["aie"], table["low"].dropna(), table["high"].dropna(), [0.0, other]])
    low, high = float(values.min()), float(values.max())
    margin = 0.12 * max(high - low, 1e-12)
    return low - margin / 2, high + margin
