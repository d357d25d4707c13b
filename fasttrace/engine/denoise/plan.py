"""From rows to UNet calls: which rows share a call, which values cross calls, and the source map at every site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ops.restore import ADD, KEEP, ZERO, add_code, slot_code
from ...patch import ZERO as ZERO_SOURCE
from ...patch import Add, Noise, Patch
from ...sites import unet_order
from .runs import Key, Row
from .stream import Joins

BUCKET = 4
"""Rows of a compiled call are a multiple of this: enough of them to need few graphs, few enough to waste little."""

Codes = NDArray[np.int32]
Slot = Patch | tuple[Key, str]
"""What a bank slot holds: a patch's own tensor, or the value that a row had at a site in an earlier call."""


@dataclass(frozen=True)
class Round:
    """One source map of a site, without the rows that keep what was computed.

    Attributes:
        copied: rows overwritten as a whole from another row of the call.
        copied_from: those other rows.
        rows: the other patched rows.
        codes: ``[len(rows), P]``, as in `fasttrace.ops.restore`.
    """

    copied: Tensor
    copied_from: Tensor
    rows: Tensor
    codes: Tensor


@dataclass
class SitePlan:
    """What happens at one site in one call, in this order: values recorded, source maps applied."""

    record: list[tuple[int, Key]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    bank: Tensor | None = None
    """What the slots hold, kept from the first call where no other call has a part in it."""


@dataclass(frozen=True, eq=False)
class CallPlan:
    """One UNet call.

    Attributes:
        rows: rows that are there from the start, then those that join, in the order in which they do.
        roots: how many are there from the start.
        joins: how the others join.
        sites: by name; a site where nothing happens is absent.
        spent: values of earlier calls that no later call reads.
        lockstep: whether no row joins and no value crosses calls, as a compiled graph needs it.
    """

    rows: list[Row]
    roots: int
    joins: Joins
    sites: dict[str, SitePlan]
    spent: list[tuple[Key, str]]
    lockstep: bool


def site_order(unet: Any) -> dict[str, int]:
    """Every site of a UNet, whole blocks included, with its place in the order in which the forward computes them."""
    names = []
    for path, block in unet_order(unet):
        for index, transformer in enumerate(getattr(block, "transformer_blocks", ())):
            inner = f"{path}.transformer_blocks.{index}"
            names += [f"{inner}.{child}" for child in ("attn1", "attn2", "ff") if getattr(transformer, child, None)]
            names.append(inner)
        names.append(path)
    return {f"unet.{name}": place for place, name in enumerate(names)}


def joining_site(row: Row, order: dict[str, int]) -> str:
    """The first site at which a row differs from its parent."""
    return min((patch.site for patch, _ in row.patches), key=order.__getitem__)


def pack(rows: Sequence[Row], budget: int, order: dict[str, int], lockstep: bool = False) -> list[list[list[Row]]]:
    """Cut rows into calls of at most ``budget`` rows, of nearly equal size: sections of calls that share values.

    Roots come first, then the rows that join, by the site where they do: so calls are full from their beginning to
    their end. Across the calls of a section, a row that joins enters with its parent's state, and a row that copies
    from another takes its recorded value: one row's values at the patched sites, kept until they are read, cost less
    than computing it again.

    Args:
        rows: a row that others copy from comes before them.
        budget: most rows of a call; with ``lockstep``, a row and those that it copies from may be more.
        order: of the sites, from `site_order`.
        lockstep: since a compiled graph neither lets rows join nor gives out values, rows that join are a section of
            their own, with the roots that they need, and the other roots' calls compute their sources again. Fewer
            roots than a compiled call has stay with the rows that join.
    """
    roots = [row for row in rows if row.parent is None]
    joiners = sorted((row for row in rows if row.parent is not None), key=lambda row: order[joining_site(row, order)])
    if not lockstep:
        return [_even(roots + joiners, budget)]
    needed = {key for row in joiners for key in (row.parent, *(source for _, source in row.patches))}
    answered = [row for row in roots if row.key in needed]
    others = [row for row in roots if row.key not in needed] if joiners else roots
    if joiners and len(others) < BUCKET:
        return [_even(roots + joiners, budget)]
    by_key = {row.key: row for row in roots}
    return [_even(answered + joiners, budget), *([call] for call in _self_contained(others, by_key, budget))]


def _even(rows: list[Row], budget: int) -> list[list[Row]]:
    calls = -(-len(rows) // budget)
    size = -(-len(rows) // max(1, calls))
    return [rows[start : start + size] for start in range(0, len(rows), size or 1)]


def _self_contained(rows: list[Row], by_key: dict[Key, Row], budget: int) -> list[list[Row]]:
    """Calls that hold what their rows copy from, with the fewest rows in the largest."""
    calls = _filled(rows, by_key, budget)
    for size in range(-(-len(rows) // max(1, len(calls))), budget):
        smaller = _filled(rows, by_key, size)
        if len(smaller) == len(calls):
            return smaller
    return calls


def _filled(rows: list[Row], by_key: dict[Key, Row], size: int) -> list[list[Row]]:
    calls: list[list[Row]] = []
    present: set[Key] = set()
    for row in rows:
        needs = {source for _, source in row.patches if source is not None}
        if not calls or len(present | needs | {row.key}) > max(size, 1 + len(needs)):
            calls.append([])
            present = set()
        calls[-1] += [by_key[key] for key in sorted(needs - present)]
        if row.key not in present:
            calls[-1].append(row)
        present |= {row.key, *needs}
    return calls


def plan_calls(
    rows: Sequence[Row],
    budget: int,
    order: dict[str, int],
    positions: Callable[[str], int],
    device: torch.device,
    lockstep: bool = False,
) -> list[CallPlan]:
    """Plan the calls of rows that may run one after another.

    Args:
        rows: a row that others copy from comes before them.
        budget: most rows of a call.
        order: of the sites, from `site_order`.
        positions: number of positions of a site's value.
        device: of the plan's tensors.
        lockstep: as in `pack`.
    """
    return [
        plan for calls in pack(rows, budget, order, lockstep) for plan in _plan_section(calls, order, positions, device)
    ]


def _plan_section(
    calls: list[list[Row]], order: dict[str, int], positions: Callable[[str], int], device: torch.device
) -> list[CallPlan]:
    computed_in: dict[Key, int] = {}
    for number, call in enumerate(calls):
        for row in call:
            computed_in.setdefault(row.key, number)
    crossing: dict[tuple[Key, str], int] = {}
    for number, call in enumerate(calls):
        present = {row.key for row in call if row.parent is None}
        for row in call:
            for patch, source in row.patches:
                if source is not None and source not in present:
                    crossing[source, patch.site] = number
    joiners = [row for call in calls for row in call if row.parent is not None]
    leaving = {row.parent for row in joiners}
    sites = frozenset(joining_site(row, order) for row in joiners)
    plans = []
    for number, call in enumerate(calls):
        recorded = [item for item in crossing if computed_in[item[0]] == number]
        spent = [item for item, last in crossing.items() if last == number]
        joins = _joins(call, leaving, sites, order, device)
        plans.append(_plan_call(call, joins, recorded, spent, order, positions, device))
    return plans


def _joins(
    rows: list[Row], leaving: set[Key | None], sites: frozenset[str], order: dict[str, int], device: torch.device
) -> Joins:
    entering: dict[str, int] = {}
    for row in rows:
        if row.parent is not None:
            site = joining_site(row, order)
            entering[site] = entering.get(site, 0) + 1
    places = [number for number, row in enumerate(rows) if row.key in leaving]
    return Joins(
        [row.parent for row in rows],
        entering,
        [rows[number].key for number in places],
        torch.tensor(places, device=device) if places else None,
        sites if places else frozenset(),
    )


def _plan_call(
    rows: list[Row],
    joins: Joins,
    recorded: list[tuple[Key, str]],
    spent: list[tuple[Key, str]],
    order: dict[str, int],
    positions: Callable[[str], int],
    device: torch.device,
) -> CallPlan:
    index = {row.key: number for number, row in enumerate(rows)}
    roots = sum(row.parent is None for row in rows)
    by_site: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for site in dict.fromkeys(patch.site for patch, _ in row.patches):
            by_site.setdefault(site, []).append(number)
    sites: dict[str, SitePlan] = {}
    for key, site in recorded:
        sites.setdefault(site, SitePlan()).record.append((index[key], key))
    alive = roots
    for site in sorted(by_site, key=order.__getitem__):
        alive += joins.entering.get(site, 0)
        plan = sites.setdefault(site, SitePlan())
        _add_rounds(plan, site, by_site[site], rows, index, alive, positions(site), device)
    crosses = any(plan.record or any(isinstance(slot, tuple) for slot in plan.slots) for plan in sites.values())
    lockstep = roots == len(rows) and not crosses and not joins.leaving
    return CallPlan(rows, roots, joins, sites, spent, lockstep)


def _add_rounds(
    plan: SitePlan,
    site: str,
    patched: list[int],
    rows: list[Row],
    index: dict[Key, int],
    alive: int,
    positions: int,
    device: torch.device,
) -> None:
    slots: dict[Slot, int] = {}

    def code_of(patch: Patch, source: Key | None) -> int:
        if patch.source is ZERO_SOURCE:
            return ZERO
        if source is not None and index.get(source, alive) < alive:
            return index[source]
        slot = slots.setdefault(patch if source is None else (source, site), len(slots))
        return add_code(slot) if isinstance(patch.source, Add | Noise) else slot_code(slot, alive)

    maps: list[dict[int, Codes]] = []
    for number in patched:
        here = [(patch, code_of(patch, source)) for patch, source in rows[number].patches if patch.site == site]
        for round_index, codes in enumerate(compose(here, positions)):
            if round_index == len(maps):
                maps.append({})
            maps[round_index][number] = codes
    plan.slots = list(slots)
    plan.rounds = [_round(codes, alive, positions, device) for codes in maps]


def compose(patches: Sequence[tuple[Patch, int]], positions: int) -> list[Codes]:
    """The source maps ``[P]`` that one row's patches on one site come to, in the order in which they apply.

    A later overwrite replaces what came before at its positions; an addition to a patched position needs a second map.
    """
    maps = [np.full(positions, KEEP, np.int32)]
    for patch, code in patches:
        assert not isinstance(patch.positions, str)
        where = slice(None) if patch.positions is None else list(patch.positions)
        if code <= ADD and (maps[-1][where] != KEEP).any():
            maps.append(np.full(positions, KEEP, np.int32))
        maps[-1][where] = code
    return maps


def _round(codes: dict[int, Codes], alive: int, positions: int, device: torch.device) -> Round:
    whole = {row: int(code[0]) for row, code in codes.items() if 0 <= code[0] < alive and (code == code[0]).all()}
    rest = [row for row in codes if row not in whole]
    table = np.stack([codes[row] for row in rest]) if rest else np.empty((0, positions), np.int32)
    return Round(
        torch.tensor(list(whole), dtype=torch.long, device=device),
        torch.tensor(list(whole.values()), dtype=torch.long, device=device),
        torch.tensor(rest, dtype=torch.long, device=device),
        torch.from_numpy(table).to(device),
    )
