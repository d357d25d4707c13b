"""Running a model's list of units on the rows of one call, some of which join on the way.

A row that joins at a site equals its parent up to there. So the parent leaves behind, as each is written, those values
that live on past such a site; the row enters with them, in the same call or in a later one, which then need not begin
at the model's input. Values from before a row entered have too few rows, and are completed when they are next read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.description import Description
from ...models.liveness import BEGINNING, Value
from ...models.unit import Forward
from .runs import Key

AtSite = Callable[[str, Tensor], Tensor]
"""Called with a site and its value; returns what the value becomes."""

Trail = dict[tuple[Key, Value], Tensor]
"""What rows have left behind, ``[1, ...]`` each."""


@dataclass(frozen=True)
class Joins:
    """Rows that leave values behind in a call, and rows that enter with them.

    Attributes:
        parents: for each row of the call the row that it joins; ``None`` for one that is there from the start.
        entering: number of rows that enter at a site.
        leaving: rows that others join.
        places: ``[len(leaving)]`` where those rows are in the call.
        left: the values that they leave.
    """

    parents: Sequence[Key | None] = ()
    entering: Mapping[str, int] = field(default_factory=dict)
    leaving: Sequence[Key] = ()
    places: Tensor | None = None
    left: frozenset[Value] = frozenset()


def execute(
    model: Description, forward: Forward, inputs: Mapping[str, Tensor], at_site: AtSite, joins: Joins, trail: Trail
) -> tuple[Tensor, ...]:
    """The model's outputs ``[B, ...]``, of the rows that are there from the start and of those that join.

    A call without rows at its beginning begins at the first site where some enter.

    Args:
        forward: its ``rows`` is the number of rows that ``inputs`` have.
        inputs: by name, ``[B, ...]``.
        at_site: what happens at sites.
        joins: who leaves and enters.
        trail: where values are left; written and read.
    """
    flow, units = model.flow, model.units
    held: dict[Value, Tensor] = {}

    def keep(value: Value, tensor: Tensor) -> None:
        held[value] = tensor
        if value in joins.left and joins.places is not None:
            rows = torch.split(tensor[joins.places], 1)
            trail.update({(key, value): row for key, row in zip(joins.leaving, rows, strict=True)})

    def of_all_rows(value: Value) -> Tensor:
        tensor = held.get(value)
        there = 0 if tensor is None else tensor.shape[0]
        if tensor is None or there < forward.rows:
            entered = [trail[key, value] for key in joins.parents[there : forward.rows] if key is not None]
            tensor = held[value] = torch.cat([*([] if tensor is None else [tensor]), *entered])
        return tensor

    model.begin(forward)
    begins_midway = forward.rows == 0
    first = min(model.place[site] for site in joins.entering) if begins_midway else 0
    if not begins_midway:
        for name, tensor in inputs.items():
            keep((name, BEGINNING), tensor)
    for place in range(first, len(units)):
        unit = units[place]
        for site in model.inside[place]:
            forward.rows += joins.entering.get(site, 0)
        if forward.rows:  # else the call begins with the rows that enter at this unit's end
            written = unit.run(forward, *(of_all_rows(value) for value in flow.reads[place]))
            tensors = (written,) if isinstance(written, Tensor) else written
            for name, tensor in zip(unit.writes, tensors, strict=True):
                keep((name, place), tensor)
        for site, name in model.ends[place]:
            forward.rows += joins.entering.get(site, 0)
            if forward.rows:  # else they enter at another of this unit's sites
                held[name, place] = at_site(site, of_all_rows((name, place)))
        for value in flow.last[place]:
            held.pop(value, None)
    return tuple(of_all_rows(value) for value in flow.outputs)
