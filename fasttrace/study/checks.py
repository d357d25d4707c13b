"""Checks of single arguments of a study, each with one clear error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StudyError
from ..prompts import Prompt


def checked_prompts(given: Any) -> tuple[Prompt, ...]:
    if isinstance(given, str | Path):
        from .promptsets import load_prompts

        given = load_prompts(given)
    prompts = (given,) if isinstance(given, Prompt) else listed("prompts", given)
    if not prompts:
        raise StudyError("prompts is empty: give at least one ft.Prompt(text, subject=...)")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise StudyError(f"prompts[{index}]={prompt!r}: expected ft.Prompt(text, subject=...)")
    ids = [prompt.id for prompt in prompts]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise StudyError(f"two prompts have the id {twice!r}: give each its own id=...")
    for prompt in prompts:
        if prompt.seeds is not None:
            checked_seeds(prompt.seeds, f"seeds of prompt {prompt.id!r}")
    return prompts


def checked_seeds(given: Any, name: str = "seeds") -> tuple[int, ...]:
    seeds = (given,) if isinstance(given, int | np.integer) else listed(name, given)
    whole = all(isinstance(seed, int | np.integer) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise StudyError(f"{name}={list(seeds)!r}: expected different whole numbers >= 0, at least one")
    return tuple(int(seed) for seed in seeds)


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """The elements of a list."""
    try:
        return tuple(given)
    except TypeError as error:
        raise StudyError(f"{name}={given!r}: expected a list") from error


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise StudyError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def whole_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StudyError(f"{name}={value!r}: expected a whole number >= 1")


def number(name: str, value: Any, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise StudyError(f"{name}={value!r}: expected a number{f' >= {least:g}' if math.isfinite(least) else ''}")


def text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise StudyError(f"{name}={value!r}: expected text")
