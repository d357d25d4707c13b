"""Which values the rest of a forward still reads: what a row that joins at a site must bring with it.

Names of values are reused, so a value is named here with the place of the unit that wrote it: ``("x", 7)``. The list is
walked once; nothing is known of what the values mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .unit import Unit

Value: TypeAlias = tuple[str, int]
"""A name, and the place of the unit that wrote the value; -1 for what the forward begins with."""

BEGINNING = -1


@dataclass(frozen=True)
class Liveness:
    """What each unit reads and what lives on, for a list of units.

    Attributes:
        reads: for each unit the values that it reads.
        last: for each unit the values that nobody reads after it.
        live: for each unit the values that it or some later unit reads.
        live_on: for each unit the values that some later unit reads, those that it wrote among them.
        outputs: the values that the forward ends with.
    """

    reads: list[tuple[Value, ...]]
    last: list[tuple[Value, ...]]
    live: list[frozenset[Value]]
    live_on: list[frozenset[Value]]
    outputs: tuple[Value, ...]


def liveness(units: Sequence[Unit], inputs: Sequence[str], outputs: Sequence[str]) -> Liveness:
    """Walk the list forwards for what is read, backwards for what is live.

    Args:
        units: in execution order.
        inputs: names that the forward begins with.
        outputs: names that are read after the last unit.
    """
    current = dict.fromkeys(inputs, BEGINNING)
    reads: list[tuple[Value, ...]] = []
    for place, unit in enumerate(units):
        reads.append(tuple((name, current[name]) for name in unit.reads))
        current |= dict.fromkeys(unit.writes, place)
    ends = tuple((name, current[name]) for name in outputs)
    wanted = set(ends)
    live: list[frozenset[Value]] = []
    live_on: list[frozenset[Value]] = []
    last: list[tuple[Value, ...]] = []
    for place in range(len(units) - 1, -1, -1):
        live_on.append(frozenset(wanted))
        written = {(name, place) for name in units[place].writes}
        last.append(tuple(sorted(({*reads[place]} | written) - wanted)))
        wanted = (wanted - written) | set(reads[place])
        live.append(frozenset(wanted))
    return Liveness(reads, last[::-1], live[::-1], live_on[::-1], ends)
