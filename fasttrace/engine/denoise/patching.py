"""A site's plan applied to the site's value, in plain tensor operations on the patched rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...corruption import philox_normal
from ...models.unit import SitePoint
from ...ops.restore import keep_all
from ...patch import Add, Noise, Patch
from ..values import given_value, to_positions
from .runs import Key
from .site_map import ADDED, COPY, SLOT, ZEROS, Round, SitePlan

Cache = dict[tuple[Key, str], Tensor]
"""Values ``[P, D]`` of rows at sites, from earlier calls."""

_NOTHING = SitePlan()


class CallSites:
    """What happens at the sites of one call.

    Args:
        plans: of the call, by name of the site.
        points: every site as its unit declares it.
        cache: values of earlier calls.
        observed: whether a hook of the user's may hold a value, so that it must not be overwritten in place.
    """

    def __init__(
        self, plans: Mapping[str, SitePlan], points: Mapping[str, SitePoint], cache: Cache, observed: bool
    ) -> None:
        self._plans, self._points, self._cache, self._observed = plans, points, cache, observed

    def at_end(self, site: str, value: Tensor) -> Tensor:
        """A value that a unit wrote, after everything that happens at its site."""
        plan = self._plans.get(site)
        if plan is None:
            return value
        value = value.clone() if self._observed else value
        patch_site(share(value, self._points[site]), site, plan, self._cache)
        return value

    def inside(self, site: str) -> Inside:
        """The map of a site whose value is made inside an op."""
        plan = self._plans.get(site)
        return Inside(site, plan or _NOTHING, self._cache)


@dataclass(frozen=True)
class Inside:
    """One site's map, as `fasttrace.models.unit.InsideSite` describes it."""

    site: str
    plan: SitePlan
    cache: Cache

    @property
    def by_op(self) -> bool:
        return self.plan.recorded is None and len(self.plan.rounds) <= 1

    def source(self, like: Tensor) -> Tensor:
        if not self.plan.rounds:
            return keep_all(like)
        return self.plan.rounds[0].source[: like.shape[0]]

    def bank(self, like: Tensor) -> Tensor | None:
        return slot_bank(like, self.site, self.plan, self.cache)

    def apply(self, value: Tensor) -> Tensor:
        return patch_site(value, self.site, self.plan, self.cache)


def share(value: Tensor, point: SitePoint) -> Tensor:
    """A head's channels of a value that holds them all; any other site's is the whole. A view."""
    return value if point.channels is None else value[..., point.channels]


def patch_site(value: Tensor, site: str, plan: SitePlan, cache: Cache) -> Tensor:
    """Record and overwrite rows of one site's value.

    Args:
        value: ``[B, P, D]`` or ``[B, C, h, w]``; overwritten in place.
        cache: written for the rows that later calls read; read for the slots that earlier calls wrote.
    """
    if plan.recorded is not None:
        rows = to_positions(value)[plan.recorded]
        cache.update({(key, site): row for key, row in zip(plan.record, rows, strict=True)})
    if plan.rounds:
        bank = slot_bank(value, site, plan, cache)
        for one in plan.rounds:
            apply_round(value, one, bank)
    return value


def apply_round(value: Tensor, one: Round, bank: Tensor | None) -> None:
    """Apply one round in place: `fasttrace.ops.restore.restore`, for the rows that it changes."""
    if to_positions(value).data_ptr() != value.data_ptr():  # a layout of which positions x channels is no view
        plain = value.contiguous()
        apply_round(plain, one, bank)
        value.copy_(plain)
        return
    for move in one.moves:
        rows, positions, source = move.rows, move.positions, move.source
        target: tuple[Tensor, ...] = (rows,) if positions is None else (rows, positions)
        # Whole rows move as they lie in memory; a bank has positions first.
        table = value if positions is None and move.kind in (COPY, ZEROS) else to_positions(value)
        if source is None:
            table[target] = 0
            continue
        read = (source,) if positions is None else (source, positions)
        if move.kind == COPY:
            table[target] = table[read]
            continue
        assert bank is not None
        if move.kind == SLOT:
            table[target] = bank[read]
        elif move.kind == ADDED:
            table[target] += bank[read]


def slot_bank(value: Tensor, site: str, plan: SitePlan, cache: Cache) -> Tensor | None:
    """``[S, P, D]``: the tensors that the plan's slots name, in the value's dtype."""
    if not plan.slots:
        return None
    if plan.bank is None:
        given = (given_table(slot, value) if isinstance(slot, Patch) else cache[slot[0], site] for slot in plan.slots)
        bank = torch.stack(list(given))
        if any(not isinstance(slot, Patch) for slot in plan.slots):
            return bank
        plan.bank = bank
    return plan.bank


def given_table(patch: Patch, value: Tensor) -> Tensor:
    """``[P, D]`` that a patch overwrites with or adds, for a value ``[B, P, D]`` or ``[B, C, h, w]``."""
    _, positions, channels = to_positions(value).shape
    spatial = (value.shape[2], value.shape[3]) if value.ndim == 4 else None
    source = patch.source
    if isinstance(source, Noise):
        drawn = source.sigma * philox_normal(source.seed, 0, range(positions), channels)
        return drawn.to(value)
    tensor = source.value if isinstance(source, Add) else source
    assert isinstance(tensor, Tensor)
    return given_value(patch, tensor, positions, channels, spatial).to(value)
