"""Counting what a plan computes: rows, forwards and operations, from the same rows that the engine runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from .memory import row_bytes
from .unet_calls import batch_size, call_rows, cost_of
from .unet_plan import joining_site, pack, site_order
from .unet_request import UNetRequest
from .unet_runs import Group, Row, corrupted_alone, distinct_runs, forced_rows, free_rows, waves


def count(requests: Sequence[UNetRequest]) -> tuple[int, float, int, float, int]:
    """Runs, forwards, rows, floating-point operations and peak bytes of requests that share their calls."""
    request = requests[0]
    cost, batch = cost_of(request), batch_size(request)
    order = site_order(request.pipe.unet)
    groups = []
    for index, one in enumerate(requests):
        groups.append(distinct_runs(index, one, dict.fromkeys([*one.conditions, None], 0)))
    forwards, rows, largest = 0.0, 0, 0
    budget, lockstep = call_rows(batch.rows, bool(request.compile))
    for part in _steps(groups, batch.parents):
        for call in chain.from_iterable(pack(part, budget, order, lockstep)):
            rows += len(call)
            largest = max(largest, len(call))
        forwards += sum(1.0 if row.parent is None else cost.suffix(joining_site(row, order)) for row in part)
    memory = largest * row_bytes(cost, request.dtype or request.latents.dtype)
    return sum(len(group.runs) for group in groups), forwards, rows, forwards * cost.flops, memory


def _steps(groups: Sequence[Group], parents: int) -> Iterator[list[Row]]:
    """Rows that the engine hands out together."""
    steps = range(groups[0].request.steps)
    if groups[0].request.protocol == "free":
        for step in steps:
            yield [row for group in groups for row in free_rows(group, step, True)[0]]
        return
    for step in steps:
        yield [row for group in groups for row in free_rows(corrupted_alone(group), step, True)[0]]
    yield from waves(
        ([row for group in groups for row in forced_rows(group, step, True)[0]] for step in steps), parents
    )
