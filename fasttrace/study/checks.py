"""Checks of single arguments of a study, each with one clear error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StudyError
from ..prompts import Prompt

SEED_LIMIT = 2**63
"""Seeds are whole numbers below it, as tables hold them and every generator takes them."""

MOST = 1_000_000
"""Elements of one list of a study, and a bound that turns a slip of the keyboard into an error instead of a hang."""

MOST_STEPS = 10_000
"""Denoising steps; no scheduler was trained with as many."""


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
    whole = all(
        isinstance(seed, int | np.integer) and not isinstance(seed, bool) and 0 <= seed < SEED_LIMIT for seed in seeds
    )
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        shown = repr(list(seeds[:8])) + (" ..." if len(seeds) > 8 else "")
        raise StudyError(f"{name}={shown}: expected different whole numbers from 0 to 2^63 - 1, at least one")
    return tuple(int(seed) for seed in seeds)


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """The elements of a list, at most `MOST`."""
    try:
        elements = tuple(itertools.islice(given, MOST + 1))
    except TypeError as error:
        raise StudyError(f"{name}={given!r}: expected a list") from error
    if len(elements) > MOST:
        raise StudyError(f"{name} has more than {MOST:,} elements: split the study")
    return elements


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise StudyError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def whole_number(name: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        limits = ">= 1" if most is None else f"from 1 to {most:,}"
        raise StudyError(f"{name}={value!r}: expected a whole number {limits}")


def number(name: str, value: Any, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise StudyError(f"{name}={value!r}: expected a number{f' >= {least:g}' if math.isfinite(least) else ''}")


def text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise StudyError(f"{name}={value!r}: expected text")
