"""From rows to calls: which values cross calls, what joining rows bring, and the map of every site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.description import Description
from ...ops.restore import ZERO, add_code, slot_code
from ...patch import ZERO as ZERO_SOURCE
from ...patch import Add, Noise, Patch
from .execute import Joins
from .packing import joining_site, pack
from .runs import Key, Row
from .site_map import Positions, SitePlan, Slot, compose, plan_round


@dataclass(frozen=True, eq=False)
class CallPlan:
    """One call of the denoiser.

    Attributes:
        rows: rows that are there from the start, then those that join, in the order in which they do.
        roots: how many are there from the start.
        text: ``[B]`` the number of each row's condition.
        joins: how the others join.
        sites: by name; a site where nothing happens is absent.
        spent: values of earlier calls that no later call reads.
        lockstep: whether no row joins and no value crosses calls, as a compiled graph needs it.
    """

    rows: list[Row]
    roots: int
    text: Tensor
    joins: Joins
    sites: dict[str, SitePlan]
    spent: list[tuple[Key, str]]
    lockstep: bool


def plan_calls(
    rows: Sequence[Row],
    budget: int,
    model: Description,
    positions: Callable[[str], int],
    device: torch.device,
    lockstep: bool = False,
) -> list[CallPlan]:
    """Plan the calls of rows that may run one after another.

    Args:
        rows: a row that others copy from comes before them.
        budget: most rows of a call.
        model: of which the order of sites is asked, and what lives on past them.
        positions: number of positions of a site's value.
        device: of the plan's tensors.
        lockstep: as in `pack`.
    """
    sections = pack(rows, budget, model.order, lockstep)
    return [plan for calls in sections for plan in _Section(calls, model, positions, device).plans()]


class _Section:
    """Calls that share values: a row's parent, or a row that it copies from, may be in an earlier one."""

    def __init__(
        self, calls: list[list[Row]], model: Description, positions: Callable[[str], int], device: torch.device
    ) -> None:
        self._calls, self._model, self._positions, self._device = calls, model, positions, device
        joiners = [row for call in calls for row in call if row.parent is not None]
        self._leaving = {row.parent for row in joiners}
        sites = {joining_site(row, model.order) for row in joiners}
        self._left = frozenset(value for site in sites for value in model.brought[site])

    def plans(self) -> list[CallPlan]:
        computed_in: dict[Key, int] = {}
        for number, call in enumerate(self._calls):
            for row in call:
                computed_in.setdefault(row.key, number)
        crossing: dict[tuple[Key, str], int] = {}
        for number, call in enumerate(self._calls):
            present = {row.key for row in call if row.parent is None}
            for row in call:
                for patch, source in row.patches:
                    if source is not None and source not in present:
                        crossing[source, patch.site] = number
        plans = []
        for number, call in enumerate(self._calls):
            recorded = [item for item in crossing if computed_in[item[0]] == number]
            spent = [item for item, last in crossing.items() if last == number]
            plans.append(self._plan(call, self._joins(call), recorded, spent))
        return plans

    def _joins(self, rows: list[Row]) -> Joins:
        entering: dict[str, int] = {}
        for row in rows:
            if row.parent is not None:
                site = joining_site(row, self._model.order)
                entering[site] = entering.get(site, 0) + 1
        places = [number for number, row in enumerate(rows) if row.key in self._leaving]
        return Joins(
            [row.parent for row in rows],
            entering,
            [rows[number].key for number in places],
            self._tensor(places) if places else None,
            self._left if places else frozenset(),
        )

    def _plan(
        self, rows: list[Row], joins: Joins, recorded: list[tuple[Key, str]], spent: list[tuple[Key, str]]
    ) -> CallPlan:
        index = {row.key: number for number, row in enumerate(rows)}
        roots = sum(row.parent is None for row in rows)
        by_site: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            for site in dict.fromkeys(patch.site for patch, _ in row.patches):
                by_site.setdefault(site, []).append(number)
        sites: dict[str, SitePlan] = {}
        for key, site in recorded:
            sites.setdefault(site, SitePlan()).record.append(key)
        for plan in sites.values():
            plan.recorded = self._tensor([index[key] for key in plan.record])
        alive = roots
        for site in sorted(by_site, key=self._model.order.__getitem__):
            alive += joins.entering.get(site, 0)
            self._add_rounds(sites.setdefault(site, SitePlan()), site, by_site[site], rows, index, alive)
        crosses = any(plan.record or any(isinstance(slot, tuple) for slot in plan.slots) for plan in sites.values())
        lockstep = roots == len(rows) and not crosses and not joins.leaving
        return CallPlan(rows, roots, self._tensor([row.text for row in rows]), joins, sites, spent, lockstep)

    def _add_rounds(
        self, plan: SitePlan, site: str, patched: list[int], rows: list[Row], index: dict[Key, int], alive: int
    ) -> None:
        slots: dict[Slot, int] = {}

        def code_of(patch: Patch, source: Key | None) -> int:
            if patch.source is ZERO_SOURCE:
                return ZERO
            if source is not None and index.get(source, alive) < alive:
                return index[source]
            slot = slots.setdefault(patch if source is None else (source, site), len(slots))
            return add_code(slot) if isinstance(patch.source, Add | Noise) else slot_code(slot, alive)

        rounds: list[dict[int, tuple[Positions, int]]] = []
        for number in patched:
            here = [(_positions(patch), code_of(patch, source)) for patch, source in rows[number].patches
                    if patch.site == site]  # fmt: skip
            for place, overwrite in enumerate(compose(here)):
                if place == len(rounds):
                    rounds.append({})
                rounds[place][number] = overwrite
        plan.slots = list(slots)
        plan.rounds = [plan_round(one, alive, self._positions(site), self._device) for one in rounds]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


def _positions(patch: Patch) -> Positions:
    assert not isinstance(patch.positions, str)
    return patch.positions
