"""The table of effects: its columns, its order, and groups of its rows reduced to one number a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ..errors import StudyError
from .statistics import Array

KEYS = (
    "prompt_id", "seed", "noise_sample", "site", "position", "token_role", "step_start", "step_stop", "branch",
    "base", "source", "protocol", "metric",
)  # fmt: skip
COLUMNS = (
    "prompt_id", "prompt", "attribute", "subject", "seed", "noise_sample", "site", "part", "kind", "layer", "position",
    "token", "token_role", "step_start", "step_stop", "branch", "base", "source", "protocol", "metric", "clean",
    "corrupted", "restored", "total_effect", "indirect_effect",
)  # fmt: skip
# What an effect means depends on these, so a mean never runs over two values of one of them unless asked by name.
MEANING = ("metric", "protocol", "base", "source", "branch")

_SIDES = ("down_blocks", "mid_block", "up_blocks")
_WITHIN = ("resnets", "attentions", "heads", "self_attn", "attn1", "attn2", "mlp", "ff")


def network_order(site: str) -> tuple[int, ...]:
    """A sort key that puts sites in the order in which the pipeline runs them: text encoders first, then the UNet.

    It reads the name alone, so that tables can be ordered where there is no model. Within a UNet block resnets and
    attentions alternate, a resnet first; heads come before their attention, and a text layer after its parts. A window
    or set of sites stands where its first one does.
    """
    part, *path = re.split(r" \+ |\.\.", site)[0].split(".")
    numbers = [int(piece) for piece in path if piece.isdigit()]
    if part != "unet":
        whole_layer = bool(path) and path[-1].isdigit() and "heads" not in path
        place = len(_WITHIN) + 1 if whole_layer else _place("heads" if "heads" in path else path[-1] if path else "")
        encoder = int(part.removeprefix("text_encoder").strip("_") or 1)
        return (0, encoder, *numbers[:1], place, *numbers[1:])
    side = path[0] if path else ""
    if side == "mid_block":
        numbers.insert(0, 0)
    names = [piece for piece in path[1:] if not piece.isdigit()]
    within = [*numbers[1:2], *(_place(name) for name in names[:1]), *numbers[2:], *(_place(name) for name in names[2:])]
    return (1, _SIDES.index(side) if side in _SIDES else len(_SIDES), *numbers[:1], *within)


def _place(name: str) -> int:
    return _WITHIN.index(name) if name in _WITHIN else len(_WITHIN)


def canonical_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by prompt, seed and sample, then site in network order, position, steps, and metric by first appearance."""
    sites = {name: rank for rank, name in enumerate(sorted(table["site"].unique(), key=network_order))}
    metrics = {name: rank for rank, name in enumerate(table["metric"].unique())}
    keyed = table.assign(site=table["site"].map(sites), metric=table["metric"].map(metrics))
    by = ["prompt_id", "seed", "noise_sample", "site", "position", "token_role", "step_start", "step_stop"]
    order = keyed.sort_values([*by, *MEANING[1:], "metric"], kind="stable").index
    return table.loc[order].reset_index(drop=True)


def is_text(table: pd.DataFrame) -> pd.Series:
    """Which rows are of text encoders alone."""
    return table["part"].str.fullmatch(r"text_encoder\w*")


def as_list(by: str | Sequence[str]) -> list[str]:
    return [by] if isinstance(by, str) else list(by)


class Groups:
    """Groups of rows, each reduced to one mean a prompt.

    Attributes:
        keys: columns that were grouped by.
        frame: one row a group: keys, ``aie``, ``to_clean``, ``total_effect``, ``share``, ``prompts``, ``runs``.
    """

    def __init__(self, table: pd.DataFrame, keys: list[str]) -> None:
        self.keys = keys
        values = table.assign(to_clean=table["restored"] - table["clean"], runs=1)
        within = [*keys] if "prompt_id" in keys else [*keys, "prompt_id"]
        how = {"indirect_effect": "mean", "total_effect": "mean", "to_clean": "mean", "runs": "sum"}
        means = values.groupby(within, dropna=False, sort=False, observed=True).agg(how).reset_index()
        grouped = means.groupby(keys, dropna=False, sort=False, observed=True)
        self._group = grouped.ngroup().to_numpy()
        self._means = means
        frame = grouped.agg(
            aie=("indirect_effect", "mean"),
            to_clean=("to_clean", "mean"),
            total_effect=("total_effect", "mean"),
            runs=("runs", "sum"),
        ).reset_index()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = frame["aie"].to_numpy() / frame["total_effect"].to_numpy()
        frame["share"] = np.where(np.isfinite(share), share, np.nan)
        frame["prompts"] = np.bincount(self._group, minlength=len(frame))
        frame["runs"] = frame.pop("runs")
        self.frame = frame

    def over_prompts(self, interval: Callable[[Array, Array], tuple[Array, Array]]) -> tuple[Array, Array]:
        """``interval(effects [g, n], totals [g, n])`` on all groups, those of the same prompts together."""
        low, high = np.full(len(self.frame), np.nan), np.full(len(self.frame), np.nan)
        effects, totals = self._pivot("indirect_effect"), self._pivot("total_effect")
        present = ~np.isnan(effects)
        patterns, which = np.unique(present, axis=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            rows = np.flatnonzero(which.ravel() == index)
            block = np.ix_(rows, np.flatnonzero(pattern))
            low[rows], high[rows] = interval(effects[block], totals[block])
        return low, high

    def common_matrix(self, rows: pd.Index) -> Array:
        """Means ``[len(rows), n]`` of the prompts that all these groups have."""
        matrix = self._pivot("indirect_effect")[rows.to_numpy()]
        common = ~np.isnan(matrix).any(0)
        if not common.any():
            raise StudyError(
                f"the groups by {', '.join(self.keys)} share no prompt, so that their order would compare prompts: use "
                "where(...) to rank within one attribute or set of prompts"
            )
        return matrix[:, common]

    def _pivot(self, value: str) -> Array:
        """``[groups, prompts]``, prompts in the order of their ids, so that the order of the rows cannot matter."""
        prompts, column = np.unique(self._means["prompt_id"].to_numpy(dtype=str), return_inverse=True)
        matrix = np.full((len(self.frame), len(prompts)), np.nan)
        matrix[self._group, column] = self._means[value].to_numpy(dtype=float)
        return matrix
