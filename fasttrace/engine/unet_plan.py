"""From rows to UNet calls: which rows share a call, which values cross calls, and the source map at every site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops.restore import ADD, KEEP, ZERO, add_code, slot_code
from ..patch import ZERO as ZERO_SOURCE
from ..patch import Add, Noise, Patch
from ..sites import unet_order
from .unet_runs import Key, Row

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
    """What happens at one site in one call, in this order: values recorded, rows joined, source maps applied."""

    record: list[tuple[int, Key]] = field(default_factory=list)
    joined: Tensor | None = None
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
        parents: ``[len(rows)]`` row that each joins; its own index for a root.
        sites: by name; a site where nothing happens is absent.
        spent: values of earlier calls that no later call reads.
        lockstep: whether no row joins and no value crosses calls, as a compiled graph needs it.
    """

    rows: list[Row]
    roots: int
    parents: Tensor
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


def pack(rows: Sequence[Row], budget: int, lockstep: bool = False) -> list[list[Row]]:
    """Cut rows into calls of at most ``budget`` rows.

    A row that joins needs its parent in the same call, and is computed again where the parent is elsewhere. A row that
    copies from another takes a recorded value where that is elsewhere: one row's values at the patched sites, kept for
    one step, cost less than computing it again.

    Args:
        rows: a row that others copy from comes before them.
        budget: most rows of a call; a row and those that it needs may be more.
        lockstep: keep rows that join in calls of their own, and have sources computed again as well, since a compiled
            graph neither grows nor gives out values. Calls are filled one after another, to need few graphs; otherwise
            they are of nearly equal size.
    """
    by_key = {row.key: row for row in rows}
    joining = [row for row in rows if lockstep and row.parent is not None]
    calls: list[list[Row]] = []
    for part in (joining, [row for row in rows if not lockstep or row.parent is None]):
        target = budget if lockstep else -(-len(part) // -(-len(part) // budget)) if part else 0
        present: set[Key] | None = None
        for row in part:
            needs = {row.parent} if row.parent is not None else set()
            if lockstep:
                needs |= {source for _, source in row.patches if source is not None}
            if present is None or len(present | needs) >= max(target, 1 + len(needs)):
                calls.append([])
                present = set()
            for key in sorted(needs - present):
                calls[-1].append(by_key[key])
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
    packed = pack(rows, budget, lockstep)
    computed_in: dict[Key, int] = {}
    for number, call in enumerate(packed):
        for row in call:
            computed_in.setdefault(row.key, number)
    crossing: dict[tuple[Key, str], int] = {}
    for number, call in enumerate(packed):
        present = {row.key for row in call if row.parent is None}
        for row in call:
            for patch, source in row.patches:
                if source is not None and source not in present:
                    crossing[source, patch.site] = number
    plans = []
    for number, call in enumerate(packed):
        recorded = [item for item in crossing if computed_in[item[0]] == number]
        spent = [item for item, last in crossing.items() if last == number]
        plans.append(_plan_call(call, recorded, spent, order, positions, device))
    return plans


def _plan_call(
    rows: list[Row],
    recorded: list[tuple[Key, str]],
    spent: list[tuple[Key, str]],
    order: dict[str, int],
    positions: Callable[[str], int],
    device: torch.device,
) -> CallPlan:
    roots = [row for row in rows if row.parent is None]
    joiners = sorted((row for row in rows if row.parent is not None), key=lambda row: order[joining_site(row, order)])
    ordered = roots + joiners
    index = {row.key: number for number, row in enumerate(ordered)}
    parents = [index[row.key if row.parent is None else row.parent] for row in ordered]
    joining: dict[str, list[int]] = {}
    for number in range(len(roots), len(ordered)):
        joining.setdefault(joining_site(ordered[number], order), []).append(number)
    by_site: dict[str, list[int]] = {}
    for number, row in enumerate(ordered):
        for site in dict.fromkeys(patch.site for patch, _ in row.patches):
            by_site.setdefault(site, []).append(number)
    sites: dict[str, SitePlan] = {}
    for key, site in recorded:
        sites.setdefault(site, SitePlan()).record.append((index[key], key))
    alive = len(roots)
    for site in sorted(by_site, key=order.__getitem__):
        plan = sites.setdefault(site, SitePlan())
        joined = joining.get(site, [])
        if joined:
            plan.joined = torch.tensor([parents[number] for number in joined], device=device)
        alive += len(joined)
        _add_rounds(plan, site, by_site[site], ordered, index, alive, positions(site), device)
    crosses = any(plan.record or any(isinstance(slot, tuple) for slot in plan.slots) for plan in sites.values())
    lockstep = len(roots) == len(ordered) and not crosses
    return CallPlan(ordered, len(roots), torch.tensor(parents, device=device), sites, spent, lockstep)


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
