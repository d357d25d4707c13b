"""Counting what a plan computes: rows, forwards and operations, from the same rows that the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ...models.heads import with_heads
from ..requests.denoise import DenoiserRequest
from .calls import batch_size, call_rows
from .cost import cost_of
from .memory import row_bytes
from .packing import joining_site, pack
from .runs import distinct_runs, forced_rows, free_rows


def count(requests: Sequence[DenoiserRequest]) -> tuple[int, float, int, float, int]:
    """Runs, forwards, rows, floating-point operations and peak bytes of requests that share their calls."""
    request = requests[0]
    model = with_heads(request.description, {name for one in requests for name in one.sites})
    cost, order = cost_of(model, request.dims), model.order
    batch = batch_size(request, cost)
    groups = []
    for index, one in enumerate(requests):
        groups.append(distinct_runs(index, one, dict.fromkeys([*one.conditions, None], 0)))
    forwards, rows, largest = 0.0, 0, 0
    budget, lockstep = call_rows(batch.rows, bool(request.compile))
    rows_at = forced_rows if request.protocol == "teacher_forced" else free_rows
    for step in range(request.steps):
        part = [row for group in groups for row in rows_at(group, step, True)[0]]
        for call in chain.from_iterable(pack(part, budget, order, lockstep)):
            rows += len(call)
            largest = max(largest, len(call))
        forwards += sum(1.0 if row.parent is None else cost.suffix(joining_site(row, order)) for row in part)
    memory = largest * row_bytes(cost, request.dtype or request.latents.dtype)
    return sum(len(group.runs) for group in groups), forwards, rows, forwards * cost.flops, memory
