"""Findings: the table of what was found, one row a (run, metric), and what can be asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from ..errors import StudyError
from . import statistics
from .folder import load_effects, save_effects
from .joining import join_records, join_tables
from .table import COLUMNS, MEANING, Groups, as_list
from .wording import counted


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """What a study found.

    Attributes:
        table: one row a (run, metric), with the columns of `COLUMNS`. ``total_effect`` is clean - corrupted;
            ``indirect_effect`` is restored - base: restored - corrupted, or restored - clean in a study that noises
            (``base="clean"``), where a site that is needed has a negative effect. Both are signed.
        record: everything needed to repeat the study, as in ``study.json``.

    The prompt is the observation in everything below: seeds, noise samples and whatever else a group holds are averaged
    within a prompt first, and intervals resample prompts. A single prompt therefore has no interval (NaN).

    Raises:
        StudyError: a column is missing, or the table is empty.
    """

    table: pd.DataFrame
    record: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.table.columns]
        if missing:
            raise StudyError(f"the table of effects lacks the columns {', '.join(missing)}")
        if self.table.empty:
            raise StudyError("the table of effects is empty: nothing was run, or a filter dropped every row")

    def __repr__(self) -> str:
        prompts = counted(self.table["prompt_id"].nunique(), "prompt")
        sites = counted(self.table["site"].nunique(), "site")
        metrics = ", ".join(self.table["metric"].unique())
        return f"<{type(self).__name__}: {counted(len(self), 'row')} of {prompts} and {sites}, in {metrics}>"

    def __len__(self) -> int:
        return len(self.table)

    def to_pandas(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def where(self, **values: Any) -> Self:
        """The rows where each column has a value, or one of several: ``where(part="unet", kind=["mlp", "resnet"])``.

        Raises:
            StudyError: an unknown column, or no such row (with the values that there are).
        """
        table = self.table
        for column, value in values.items():
            self._check_columns([column])
            several = isinstance(value, Iterable) and not isinstance(value, str)
            chosen = table[table[column].isin(list(value) if several else [value])]
            if chosen.empty:
                there = ", ".join(str(v) for v in list(table[column].dropna().unique())[:8])
                raise StudyError(f"no effects with {column}={value!r}; there are {there}")
            table = chosen
        return type(self)(table, self.record)

    def aie(
        self, by: str | Sequence[str] = "site", *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """Average indirect effect of each group, with its bootstrap interval.

        Args:
            by: columns to group by. Columns that change an effect's meaning (`MEANING`) and have several values are
                added: effects in different metrics are never averaged.

        Returns:
            One row a group, in order of first appearance: the columns of ``by``, ``metric``, ``aie``, ``low``, ``high``
            (the interval), ``to_clean`` (mean of restored - clean), ``total_effect``, ``share`` (``aie`` over
            ``total_effect``), ``prompts`` and ``runs``.

        Raises:
            StudyError: an unknown column, a confidence that is not between 0 and 1, or no resamples.
        """
        groups = self._groups(by)
        low, high = groups.over_prompts(
            lambda effect, _: statistics.mean_interval(effect, confidence, resamples, seed),
        )
        result = groups.frame.copy()
        place = result.columns.get_loc("aie")
        assert isinstance(place, int)
        result.insert(place + 1, "low", low)
        result.insert(place + 2, "high", high)
        return result

    def normalized(
        self, by: str | Sequence[str] = "site", *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """Normalised effect of each group: mean indirect over mean total effect; 0 is corrupted, 1 is clean.

        A ratio of means, since the mean of ratios is ruled by the prompts that corruption hardly changes. Columns:
        those of ``by``, ``metric``, ``normalized``, ``low``, ``high``, ``total_effect``, ``prompts``, ``runs``.
        """
        groups = self._groups(by)
        low, high = groups.over_prompts(
            lambda effect, total: statistics.ratio_interval(effect, total, confidence, resamples, seed),
        )
        frame = groups.frame
        result = frame[groups.keys].copy()
        result["normalized"] = frame["share"]
        result["low"], result["high"] = low, high
        return result.join(frame[["total_effect", "prompts", "runs"]])

    def rank(
        self, by: str | Sequence[str] = "site", *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """`aie`, strongest first, with what the data say about the order.

        Strongest is the highest in a study that restores, and the lowest in one that noises (see `direction`). Added
        columns: ``rank`` (equal values share the better one), ``rank_low`` and ``rank_high`` (the bootstrap interval
        of the rank), and ``tied_with_first`` (the paired difference from the first group does not exclude zero; with
        one prompt nothing can be excluded). Ranks are within each metric, and within each value of the other columns
        that change an effect's meaning. They are of the mean over the prompts that all these groups have, which is
        ``aie`` unless some group has prompts that another lacks.

        Raises:
            StudyError: groups that share no prompt, whose order would compare prompts.
        """
        groups = self._groups(by)
        table = self.aie(by, confidence=confidence, resamples=resamples, seed=seed)
        meaning = [name for name in self.meaning() if name == "metric" or name not in as_list(by)]
        parts = []
        for _, part in table.groupby(meaning, sort=False, dropna=False):
            sign = self.direction(part["base"].iloc[0] if "base" in part else None)
            matrix = sign * groups.common_matrix(part.index)
            strength = pd.Series(matrix.mean(1), part.index)
            order = np.argsort(-strength.to_numpy(), kind="stable")
            low, high = statistics.rank_interval(matrix, confidence, resamples, seed)
            gap = matrix[order[0]] - matrix
            gap_low, gap_high = statistics.mean_interval(gap, confidence, resamples, seed)
            ranked = part.assign(
                rank=strength.rank(ascending=False, method="min").astype(int),
                rank_low=low,
                rank_high=high,
                tied_with_first=~((gap_low > 0) | (gap_high < 0)),
            )
            parts.append(ranked.iloc[order])
        return pd.concat(parts, ignore_index=True)

    def compare(
        self,
        site_a: str | Mapping[str, Any],
        site_b: str | Mapping[str, Any],
        *,
        confidence: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
        **where: Any,
    ) -> pd.DataFrame:
        """Paired comparison of two sites: the same prompts, seeds and noise samples in both.

        Args:
            site_a: a site's name, or columns and values, as in
                ``{"site": "text_encoder.encoder.layers.0.self_attn", "token_role": "subject_last"}``.
            site_b: as ``site_a``.
            where: columns and values that hold for both.

        Returns:
            One row a metric: ``aie_a``, ``aie_b``, ``difference`` (a - b), ``low``, ``high``, ``p_value`` (two-sided,
            of random sign flips of the prompts' differences), ``prompts``, ``pairs``.

        Raises:
            StudyError: no such rows, or no pair that both sites have.
        """
        base = self.where(**where) if where else self
        pair = ["prompt_id", "seed", "noise_sample"]
        keys = base.meaning()
        sides = []
        for site in (site_a, site_b):
            chosen = base.where(**({"site": site} if isinstance(site, str) else dict(site)))
            sides.append(chosen.table.groupby([*keys, *pair], sort=True)["indirect_effect"].mean())
        both = pd.concat(sides, axis=1, keys=["a", "b"], join="inner")
        if both.empty:
            raise StudyError(f"{site_a!r} and {site_b!r} share no (prompt, seed, noise sample): nothing to pair")
        rows = []
        for values, part in both.groupby(level=keys, sort=False):
            means = part.groupby(level="prompt_id").mean()
            gap = (means["a"] - means["b"]).to_numpy()
            low, high = statistics.mean_interval(gap, confidence, resamples, seed)
            rows.append(
                dict(zip(keys, values, strict=True))
                | {
                    "aie_a": means["a"].mean(), "aie_b": means["b"].mean(), "difference": gap.mean(),
                    "low": float(low), "high": float(high), "p_value": statistics.sign_flip_p(gap, seed=seed),
                    "prompts": len(gap), "pairs": len(part),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def join(self, other: Findings) -> Self:
        """This table and another's rows; rows that both have count once. Halves of a study give the whole.

        Raises:
            StudyError: the two were made under different settings, or disagree about a row.
        """
        record = join_records(self.record, other.record)
        return type(self)(join_tables(self.table, other.table), record)

    def save(self, folder: str | Path) -> Path:
        """Write ``effects.parquet`` and ``study.json`` into a folder, both or neither."""
        save_effects(Path(folder), self.table, self.record)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyError: no effects in that folder.
        """
        return cls(*load_effects(Path(folder)))

    def meaning(self) -> list[str]:
        """``metric``, and the other columns of `MEANING` that have several values here."""
        spread = [name for name in MEANING[1:] if self.table[name].nunique(dropna=False) > 1]
        return ["metric", *spread]

    def direction(self, base: str | None = None) -> int:
        """1 where a strong effect is a high one; -1 where it is a low one.

        Noising a site that is needed lowers the score. Where pictures are scored against a prompt's target, patching
        that target in raises it.

        Args:
            base: of the runs that are meant, where the table has several.
        """
        noises = (base or self.table["base"].iloc[0]) == "clean"
        return -1 if noises and self.record.get("scored_text") != "target" else 1

    def _check_columns(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.table.columns]
        if unknown:
            raise StudyError(f"no column {unknown[0]!r} in the effects: expected among {', '.join(COLUMNS)}")

    def _groups(self, by: str | Sequence[str]) -> Groups:
        names = as_list(by)
        self._check_columns(names)
        return Groups(self.table, list(dict.fromkeys([*names, *self.meaning()])))
