"""A site's map: what happens at one site in one call, as data that is made when the call is planned.

What a row does there is a *code* (copy from a row, read a bank slot, be zero, have a slot added; `ops.restore`
lists them) and a *mask*, the number of a set of positions in a table. Two numbers a row, whatever the resolution; a row
with several patches at one site takes several rounds. Three readers share it: eager copies take the index tensors that
stand beside the numbers, compiled graphs the dense map that `Round.dense` makes of them, kernels the numbers.

Rows that others copy from are unpatched at the site, so within a round nothing is read that the round writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ops.restore import ADD, KEEP, ZERO
from ...patch import Patch
from .runs import Key

Slot: TypeAlias = Patch | tuple[Key, str]
"""What a bank slot holds: a patch's own tensor, or the value that a row had at a site in an earlier call."""

Positions: TypeAlias = tuple[int, ...] | None
"""Positions that a patch overwrites; ``None`` for all."""

COPY, ZEROS, SLOT, ADDED = "copy", "zeros", "slot", "added"


@dataclass(frozen=True)
class Move:
    """One kind of overwrite of some rows, or of some positions of some rows, as eager code makes it.

    Attributes:
        kind: `COPY` from rows of the call, `ZEROS`, `SLOT` from the bank, or `ADDED` from it.
        rows: ``[n]``.
        positions: ``[n]``, or ``None`` for whole rows.
        source: ``[n]`` rows or slots; nothing for zeros.
    """

    kind: str
    rows: Tensor
    positions: Tensor | None
    source: Tensor | None


@dataclass(frozen=True)
class Round:
    """One overwrite of each row, at most.

    Attributes:
        codes: ``[B]`` int32, ``KEEP`` for rows that are not patched.
        masks: ``[B]`` int32, a row of ``table``.
        table: ``[M, P]`` bool; row 0 is every position.
        moves: the same for eager code.
        source: ``[B, P]`` int32, as ops take it: an expanded view of ``codes`` where whole rows are patched.
    """

    codes: Tensor
    masks: Tensor
    table: Tensor
    moves: tuple[Move, ...]
    source: Tensor

    def dense(self, rows: int) -> Tensor:
        """The map ``[rows, P]`` int32 of `fasttrace.ops.restore`, for a call that is padded to ``rows`` rows.

        A slot's code counts from the number of rows, which padding raises.
        """
        own = self.codes.shape[0]
        codes = torch.where(self.codes >= own, self.codes + (rows - own), self.codes)
        dense = torch.where(self.source != KEEP, codes[:, None], KEEP)
        return torch.nn.functional.pad(dense, (0, 0, 0, rows - own), value=KEEP)


@dataclass
class SitePlan:
    """What happens at one site in one call, in this order: values recorded, maps applied.

    Attributes:
        record: rows whose values later calls read.
        recorded: ``[len(record)]`` where those rows are in the call.
        rounds: the site's maps.
        slots: what the bank slots hold.
        bank: ``[S, P, D]``, kept from the first call where no other call has a part in it.
    """

    record: list[Key] = field(default_factory=list)
    recorded: Tensor | None = None
    rounds: list[Round] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    bank: Tensor | None = None


def compose(patches: Sequence[tuple[Positions, int]]) -> list[tuple[Positions, int]]:
    """The overwrites that one row's patches on one site come to, one a round, in the order in which they apply.

    What a later overwrite of all positions hides is left out.
    """
    kept: list[tuple[Positions, int]] = []
    for positions, code in patches:
        if positions is None and code > ADD:
            kept = []
        kept.append((positions, code))
    return kept


def plan_round(overwrites: dict[int, tuple[Positions, int]], rows: int, positions: int, device: torch.device) -> Round:
    """One round of a site.

    Args:
        overwrites: by row of the call: positions and code.
        rows: of the call when the site is reached.
        positions: of the site's value.
        device: of the plan's tensors.
    """
    codes, masks = np.full(rows, KEEP, np.int32), np.zeros(rows, np.int32)
    numbers: dict[Positions, int] = {None: 0}
    for row, (where, code) in overwrites.items():
        codes[row], masks[row] = code, numbers.setdefault(where, len(numbers))
    table = np.zeros((len(numbers), positions), bool)
    for where, number in numbers.items():
        table[number, slice(None) if where is None else list(where)] = True
    moves: list[Move] = []
    for kind, first, chosen in (
        (COPY, 0, (codes >= 0) & (codes < rows)),
        (ZEROS, 0, codes == ZERO),
        (SLOT, rows, codes >= rows),
        (ADDED, ADD, codes <= ADD),
    ):
        source = ADD - codes if kind == ADDED else codes - first
        moves += _moves(kind, np.flatnonzero(chosen), source, masks, table, device)
    source = np.broadcast_to(codes[:, None], (rows, positions))
    if masks.any():
        source = np.where(table[masks], source, KEEP)
    on_device = _tensor(codes, device)
    by_position = _tensor(source, device) if masks.any() else on_device[:, None].expand(rows, positions)
    return Round(on_device, _tensor(masks, device), _tensor(table, device), tuple(moves), by_position)


def _moves(
    kind: str,
    rows: NDArray[np.int64],
    source: NDArray[np.int32],
    masks: NDArray[np.int32],
    table: NDArray[np.bool_],
    device: torch.device,
) -> list[Move]:
    """Whole rows apart from rows of which some positions move."""
    moves = []
    whole, partly = rows[masks[rows] == 0], rows[masks[rows] != 0]
    if len(whole):
        read = None if kind == ZEROS else _tensor(source[whole].astype(np.int64), device)
        moves.append(Move(kind, _tensor(whole, device), None, read))
    if len(partly):
        at, positions = np.nonzero(table[masks[partly]])
        read = None if kind == ZEROS else _tensor(source[partly[at]].astype(np.int64), device)
        moves.append(Move(kind, _tensor(partly[at], device), _tensor(positions, device), read))
    return moves


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
