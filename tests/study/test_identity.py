"""Names of callables: equal for equal code and state, different for everything that changes what they do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttrace.study.identity import UnknownError, identity

SCALE = 2.0


def helper(x: float) -> float:
    return SCALE * x


def scaled(x: float) -> float:
    return helper(x)


def powered(power: Any) -> Callable[[float], float]:
    return lambda x: x**power


class Judge:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: float) -> torch.Tensor:
        return self.weight * x


def test_equal_code_and_state_have_one_name_and_any_change_another() -> None:
    assert identity(powered(2)) == identity(powered(2))
    assert identity(powered(torch.ones(2))) == identity(powered(torch.ones(2)))
    assert identity(Judge(torch.ones(3))) == identity(Judge(torch.ones(3)))
    different = [
        powered(2), powered(3), powered(torch.ones(2)), powered(torch.zeros(2)), Judge(torch.ones(3)),
        Judge(torch.zeros(3)), Judge(torch.ones(3)).__call__, functools.partial(scaled, 1),
        functools.partial(scaled, 2),
        lambda x: x, lambda x: x + 1, lambda x, y=1: x, lambda x, y=2: x, torch.relu, torch.sigmoid,
    ]  # fmt: skip
    assert len({identity(one) for one in different}) == len(different)


def test_what_a_function_reads_beside_its_own_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(scaled)
    assert identity(scaled) == before
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert identity(scaled) != before


def test_a_version_stands_for_everything_and_the_unreadable_is_refused() -> None:
    first, second = powered(iter([2])), powered(iter([3]))
    with pytest.raises(UnknownError, match="list_iterator"):
        identity(first)
    first.version, second.version = "a", "a"  # type: ignore[attr-defined]
    assert identity(first) == identity(second)
    second.version = "b"  # type: ignore[attr-defined]
    assert identity(first) != identity(second)
