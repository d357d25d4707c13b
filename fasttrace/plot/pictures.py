"""Picture grid: the clean and the corrupted picture, and restored ones, each with its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import StudyError
from ..findings.wording import number
from . import style


@dataclass(frozen=True)
class Picture:
    """One cell of a grid.

    Attributes:
        image: ``[H, W, 3]``, uint8, or floats in [0, 1].
        title: what it is: ``"clean"``, ``"corrupted"``, or the restored site.
        score: its score, or ``None``.
        color: of its frame and title.
    """

    image: NDArray[np.generic]
    title: str
    score: float | None = None
    color: str = style.INK


def picture_grid(
    rows: Sequence[tuple[str, Sequence[Picture]]], path: str | Path, *, title: str, explanation: str = ""
) -> Path:
    """Draw rows of pictures, each with a label on its left.

    Args:
        rows: label and pictures of each row; rows may differ in length.
        path: of a PNG, SVG or PDF.
        title: over the grid.
        explanation: under it.

    Raises:
        StudyError: no pictures.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if columns == 0:
        raise StudyError("a picture grid needs at least one picture")
    # A title that stands over every picture of a column is written once, at the top.
    titles = [[picture.title for picture in pictures] for _, pictures in rows]
    shared = all(line == titles[0] for line in titles)
    lines = 1 + max(title.count("\n") for line in titles for title in line)
    height = 1.88 * len(rows) + 0.17 * lines * (1 if shared else len(rows))
    fig = style.figure(max(1.55 * columns + 1.2, 6.0), height + 0.7)
    axes = fig.subplots(len(rows), columns, squeeze=False, gridspec_kw={"hspace": 0.0})
    for place, ((label, pictures), line) in enumerate(zip(rows, axes, strict=True)):
        for index, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if index >= len(pictures):
                axis.set_visible(False)
                continue
            picture = pictures[index]
            axis.imshow(picture.image, interpolation="nearest" if picture.image.shape[0] <= 128 else "antialiased")
            if place == 0 or not shared:
                axis.set_title(picture.title, fontsize=8.5, color=picture.color, fontweight="bold")
            if picture.score is not None:
                axis.set_xlabel(number(picture.score), fontsize=9, color=style.INK, labelpad=3)
            for spine in axis.spines.values():
                spine.set(color=picture.color, linewidth=1.6)
        line[0].set_ylabel(label, fontsize=9, color=style.MUTED, rotation=90, labelpad=6)
    style.heading(fig, title, explanation)
    return style.save(fig, path)
