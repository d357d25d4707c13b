"""A site's plan applied to the site's value, in plain tensor operations on the patched rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...corruption import philox_normal
from ...ops.restore import ADD, ZERO
from ...patch import Add, Noise, Patch
from ..values import given_value, to_positions
from .plan import Round, SitePlan
from .runs import Key

Cache = dict[tuple[Key, str], Tensor]
"""Values ``[P, D]`` of rows at sites, from earlier calls."""


def patch_site(value: Tensor, site: str, plan: SitePlan, cache: Cache) -> Tensor:
    """Record and overwrite rows of one site's value.

    Args:
        value: ``[B, P, D]`` or ``[B, C, h, w]``; overwritten in place.
        cache: written for the rows that later calls read; read for the slots that earlier calls wrote.
    """
    if plan.record:
        rows = to_positions(value)[[row for row, _ in plan.record]].clone()
        cache.update({(key, site): row for (_, key), row in zip(plan.record, rows, strict=True)})
    if plan.rounds:
        bank = slot_bank(value, site, plan, cache)
        for one in plan.rounds:
            apply_round(value, one, bank)
    return value


def apply_round(value: Tensor, one: Round, bank: Tensor | None) -> None:
    """Apply one source map in place: `fasttrace.ops.restore.restore`, for the rows that it changes."""
    if one.copied.numel():
        value[one.copied] = value[one.copied_from]
    if not one.rows.numel():
        return
    table, codes = to_positions(value), one.codes.long()
    count = value.shape[0]

    def entries(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, position = chosen.nonzero(as_tuple=True)
        return one.rows[row], position, codes[row, position]

    row, position, code = entries((codes >= 0) & (codes < count))
    read = table[code, position]
    zero_row, zero_position, _ = entries(codes == ZERO)
    table[zero_row, zero_position] = 0
    if bank is not None:
        slot_row, slot_position, slot = entries(codes >= count)
        table[slot_row, slot_position] = bank[slot - count, slot_position]
        add_row, add_position, add = entries(codes <= ADD)
        table[add_row, add_position] += bank[ADD - add, add_position]
    table[row, position] = read


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
