"""Joining two tables of effects, and the records that say how each came about, so that halves give the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..errors import StudyError
from .table import KEYS, canonical_order

# What two studies may differ in, and still add up to one; each line is one direction in which a table grows.
_DIRECTIONS = (("prompts", "seeds"), ("sites",), ("positions",), ("steps",), ("metrics", "callables"))
# What a record says about how a study came about, without effect on its results.
CIRCUMSTANCES = ("versions", "preset", "screening")


def join_tables(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Rows of both, in canonical order; rows that both have count once.

    Raises:
        StudyError: a row that both have, with scores further apart than batches of different size can explain.
    """
    both = pd.concat([first, second], ignore_index=True)
    kept = both.drop_duplicates(list(KEYS), ignore_index=True)
    again = both[both.duplicated(list(KEYS))].merge(kept, on=list(KEYS), suffixes=("", "_first"))
    apart = again[~np.isclose(again["restored"], again["restored_first"], rtol=1e-3, atol=1e-4)]
    if len(apart):
        row = apart.iloc[0]
        raise StudyError(
            f"cannot join: {row['site']} of {row['prompt_id']!r} (seed {row['seed']}, {row['metric']}) is "
            f"{row['restored_first']:.6g} in one and {row['restored']:.6g} in the other"
        )
    return canonical_order(kept)


def join_records(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the joined study.

    Raises:
        StudyError: settings that differ and change results, or growth in two directions at once, which leaves gaps.
    """
    free = {name for direction in _DIRECTIONS for name in direction} | set(CIRCUMSTANCES)
    for name in dict.fromkeys([*first, *second]):
        if name not in free and first.get(name) != second.get(name):
            raise StudyError(
                f"cannot join: {name} is {_short(first.get(name))} in one study and {_short(second.get(name))} in the "
                "other; effects add up only under the same settings"
            )
    grown = [names for names in _DIRECTIONS if any(first.get(name) != second.get(name) for name in names)]
    if len(grown) > 1:
        raise StudyError(
            f"cannot join: the studies differ in both {grown[0][0]} and {grown[1][0]}, so that the joined table would "
            "have gaps; join along one at a time"
        )
    record = dict(first)
    for name in grown[0] if grown else ():
        record[name] = (_joined_steps if name == "steps" else _union)(first.get(name), second.get(name))
    if grown and grown[0][0] == "prompts":
        record["prompts"] = _joined_prompts(first, second, record["seeds"])
    for name in CIRCUMSTANCES[1:]:
        if first.get(name) != second.get(name):
            record[name] = None if name == "preset" else {"parts": [first.get(name), second.get(name)]}
    return record


def _union(first: Any, second: Any) -> Any:
    if first == second:
        return first
    if isinstance(first, dict) or isinstance(second, dict):
        return _joined_callables(first or {}, second or {})
    lists = [value if isinstance(value, list) else [value] for value in (first, second)]
    return lists[0] + [value for value in lists[1] if value not in lists[0]]


def _joined_callables(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    for name in first.keys() & second.keys():
        if first[name] != second[name]:
            raise StudyError(f"cannot join: the metric {name!r} has other code in one study than in the other")
    return {**first, **second}


def _joined_steps(first: Any, second: Any) -> list[Any]:
    """Sets of steps of both, where a list of indices is one set."""
    sets: list[Any] = []
    for steps in (first, second):
        whole = not isinstance(steps, list) or all(isinstance(step, int) for step in steps)
        sets += [one for one in ([steps] if whole else steps) if one not in sets]
    spans = [(min(one), max(one)) for one in sets if isinstance(one, list) and one]
    twice = next((span for span in spans if spans.count(span) > 1), None)
    if twice is not None:
        raise StudyError(
            f"cannot join: both have steps from {twice[0]} to {twice[1]}, but not the same ones between; a table could "
            "not tell them apart"
        )
    return sets


def _joined_prompts(first: Mapping[str, Any], second: Mapping[str, Any], seeds: list[int]) -> list[Any]:
    """Prompts of both by id. A prompt keeps a list of seeds of its own where it does not have all of the study's."""
    own: dict[str, dict[str, Any]] = {}
    for record in (first, second):
        for prompt in record.get("prompts") or ():
            had = own.setdefault(prompt["id"], {**prompt, "seeds": []})
            if {**had, "seeds": None} != {**prompt, "seeds": None}:
                raise StudyError(f"cannot join: prompt {prompt['id']!r} is not the same in both studies")
            mine = record["seeds"] if prompt["seeds"] is None else prompt["seeds"]
            had["seeds"] = had["seeds"] + [seed for seed in mine if seed not in had["seeds"]]
    return [
        {**prompt, "seeds": None if set(prompt["seeds"]) == set(seeds) else prompt["seeds"]} for prompt in own.values()
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
