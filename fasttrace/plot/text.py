"""Text heatmap: token (down) by layer (across), one panel a kind, on a scale from the corrupted to the clean run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..findings.findings import Findings
from ..findings.table import Groups, is_text
from ..findings.wording import KIND_NAMES, number
from . import style

KINDS = ("hidden", "mlp", "self_attn")
_ROLES = ("bos", "before", "subject_first", "subject", "subject_last", "after", "eos", "pad")


def draw_text(fig: Any, effects: Findings) -> None:
    """Draw text sites into a figure or subfigure; a row of panels for each text encoder.

    A cell is the mean score of its restored runs, so that it can be held against the two baselines at the ends of the
    scale. One prompt is shown token by token, several by token role.
    """
    table = effects.to_pandas()
    table = table[is_text(table)]
    table = table.assign(**_rows(table))
    labels = table.groupby("row")["label"].first().sort_index()
    baselines = table.groupby("prompt_id")[["corrupted", "clean"]].mean().mean()
    cells = Groups(table, ["part", "kind", "layer", "row"]).frame
    cells["score"] = baselines[table["base"].iloc[0]] + cells["aie"]
    parts, kinds = sorted(cells["part"].unique()), [kind for kind in KINDS if kind in set(cells["kind"])]
    best = cells.iloc[int(cells["aie"].abs().argmax())]
    axes = fig.subplots(len(parts), len(kinds), squeeze=False)
    for part, line in zip(parts, axes, strict=True):
        for kind, axis in zip(kinds, line, strict=True):
            panel = cells[(cells["part"] == part) & (cells["kind"] == kind)]
            _draw_panel(fig, axis, panel, labels, kind, baselines, named=axis is line[0])
            if (part, kind) == (best["part"], best["kind"]):
                _mark(axis, best["layer"], list(labels.index).index(best["row"]), number(best["score"]))
        line[0].set_ylabel(part if len(parts) > 1 else "token" if _by_token(table) else "token role", fontsize=9.5)


def rows_shown(effects: Findings) -> int:
    """How many rows `draw_text` makes, to size a figure by."""
    table = effects.to_pandas()
    table = table[is_text(table)]
    return int(_rows(table)["row"].nunique()) * int(table["part"].nunique())


def _by_token(table: pd.DataFrame) -> bool:
    return table["prompt_id"].nunique() == 1 and bool(table["position"].notna().all())


def _rows(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Where each effect stands (``row``) and what the row is called; a star for the subject, padding in one row."""
    role = table["token_role"].fillna("all tokens").astype(str)
    starred = role.str.startswith("subject")
    if not _by_token(table):
        place = {name: index for index, name in enumerate([*_ROLES, *sorted(set(role) - set(_ROLES))])}
        return {"row": role.map(place), "label": role.str.replace("_", " ") + starred.map({True: " ★", False: ""})}
    pad = role == "pad"
    position = table["position"].astype(int)
    if pad.any():
        position = position.where(~pad, int(position[pad].min()))
    word = table["token"].astype(str).replace({"<|startoftext|>": "[start]", "<|endoftext|>": "[end]"})
    count = table.loc[pad, "position"].nunique()
    word = word.where(~pad, f"padding (mean of {count})" if count > 1 else "padding")
    return {"row": position, "label": word + starred.map({True: " ★", False: ""})}


def _draw_panel(
    fig: Any, axis: Any, cells: pd.DataFrame, labels: pd.Series, kind: str, baselines: pd.Series, *, named: bool
) -> None:
    layers = sorted(cells["layer"].unique())
    grid = cells.pivot(index="row", columns="layer", values="score").reindex(index=labels.index, columns=layers)
    low, high = sorted((baselines["corrupted"], baselines["clean"]))
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    values = grid.to_numpy(dtype=float)
    image = axis.imshow(np.ma.masked_invalid(values), cmap=style.MAPS[kind], vmin=low, vmax=high, aspect="auto")
    axis.set_title(KIND_NAMES[kind], fontsize=10.5, color=style.COLORS[kind], fontweight="bold")
    step = max(1, -(-len(layers) // 12))
    axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.set_xlabel("layer", fontsize=9.5)
    style.plain(axis)
    axis.set_yticks(range(len(labels)), labels.tolist() if named else [])
    for tick in axis.get_yticklabels():
        if tick.get_text().endswith("★"):
            tick.set(fontweight="bold", color=style.INK)
    axis.set_xticks(np.arange(len(layers)) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(labels)) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    for spine in axis.spines.values():
        spine.set(visible=True, color=style.LINE)
    finite = values[np.isfinite(values)]
    ends = ("min" if (finite < low).any() else "") + ("max" if (finite > high).any() else "")
    named_ends = sorted((float(baselines[name]), name) for name in ("corrupted", "clean"))
    style.scale(fig, image, axis, [f"{name}\n{number(value)}" for value, name in named_ends], ends)


def _mark(axis: Any, x: float, y: float, text: str) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=style.INK, linewidth=1.6, clip_on=False))
    axis.annotate(
        text, (x + 0.5, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=style.INK,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )  # fmt: skip
