"""One look for every figure, set on the artists themselves, so that a caller's matplotlib settings stay as they are."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

INK, MUTED, LINE, GROUND = "#1d2433", "#667085", "#d7dce3", "#f4f6f9"
# The field's colours: purple for hidden states, green for MLPs, red for attention; the UNet's other kinds beside them.
MAPS = {"hidden": "Purples", "mlp": "Greens", "self_attn": "Reds", "cross_attn": "Oranges", "resnet": "Blues"}
COLORS = {
    "hidden": "#6a51a3",
    "mlp": "#2b8a57",
    "self_attn": "#c8372d",
    "cross_attn": "#dd7f1c",
    "resnet": "#2f6fb3",
    "head": "#b0468f",
}


def figure(width: float, height: float) -> Any:
    """A figure of ``width`` x ``height`` inches that belongs to no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(fig: Any, path: str | Path) -> Path:
    """Write a figure; a reader never sees half of one."""
    target = Path(path)
    from matplotlib.text import Text

    # A prompt or a file name may hold "$", which is no mathematics. Numbers on axes have no text before they are drawn.
    for text in fig.findobj(Text):
        if text.get_text():
            text.set_parse_math(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part{target.suffix or '.png'}")
    try:
        fig.savefig(part, dpi=150)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def heading(fig: Any, title: str, explanation: str) -> None:
    """A title above, and below a line or two on how to read the figure."""
    # Letters of this size are about 0.11 inch wide; what does not fit on one line goes on to the next.
    title = textwrap.fill(title, int(fig.get_figwidth() / 0.11))
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    fig.supxlabel(explanation, x=0.01, ha="left", fontsize=9, color=MUTED)


def baselines(base: str, total: float) -> dict[str, float]:
    """Where the corrupted and the clean run stand on an axis of indirect effects, whose zero is the patched run."""
    return {"corrupted": -total, "clean": 0.0} if base == "clean" else {"corrupted": 0.0, "clean": total}


def effect_label(base: str) -> str:
    """What an axis of indirect effects shows."""
    return f"average indirect effect: {'patched − clean' if base == 'clean' else 'restored − corrupted'} score"


def plain(axis: Any, *, grid: str | None = None) -> None:
    """Light spines and ticks, and a grid behind the data along one axis."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(LINE)
    axis.tick_params(colors=MUTED, labelsize=8.5, length=3, color=LINE)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(True, axis=grid, color=LINE, linewidth=0.6)


def scale(fig: Any, image: Any, axis: Any, ends: list[str], beyond: str = "minmax") -> None:
    """A colour scale under a panel that names its two ends; ``beyond`` says on which sides values exceed it."""
    extend = {"": "neither", "minmax": "both"}.get(beyond, beyond)
    bar = fig.colorbar(image, ax=axis, orientation="horizontal", fraction=0.05, pad=0.02, aspect=28, extend=extend)
    bar.set_ticks([image.norm.vmin, image.norm.vmax], labels=ends)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.outline.set_visible(False)
