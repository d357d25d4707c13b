"""The picture grid of a judgement: a row a prompt, the seeds before the edit, then the same seeds under it."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from .judge import Judgement

_LABEL, _CELL = 2.6, 0.85  # inches


def save_grid(judgement: Judgement, path: str | Path, seeds: int = 4) -> Path:
    """Write the grid as PNG, with at most ``seeds`` pictures on each side."""
    from matplotlib.figure import Figure

    groups = judgement.table.reset_index(drop=True).groupby(["about", "prompt"], sort=False).groups
    shown = min(seeds, max(map(len, groups.values())))
    width, height = _LABEL + 2 * shown * _CELL, 0.3 + len(groups) * _CELL
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(groups), 2 * shown, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, ((about, prompt), rows) in zip(axes, groups.items(), strict=True):
        for column, row in enumerate(list(rows)[:shown]):
            for side, images in enumerate((judgement.before, judgement.after)):
                line[side * shown + column].imshow(images[row].permute(1, 2, 0).numpy())
        label = f"{about}\n{fill(prompt, 34)}"
        line[0].text(-0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=6)
    for title, column in (("before", 0), ("after", shown)):
        axes[0][column].set_title(title, loc="left", fontsize=8)
    figure.subplots_adjust(_LABEL / width, 0.01, 0.99, 1 - 0.3 / height, 0.04, 0.04)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    return path
