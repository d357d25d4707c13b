"""What patching itself costs: a batch of patched runs beside a batch of as many runs that nothing is done to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.denoise.trace import run_request
from ..patch import Patch
from ..pipeline import encode_prompt, needs_added
from ..sites import Site
from .ceilings import seconds_of
from .savings import sweep_request

STEPS = 2


@dataclass(frozen=True)
class Overhead:
    """Seconds of the same number of rows and steps, patched and not.

    Attributes:
        rows: runs of each batch, beside clean and corrupted.
        patched: seconds with one site restored in each run.
        plain: seconds with runs of other texts and no patch.
    """

    rows: int
    patched: float
    plain: float

    @property
    def share(self) -> float:
        """Extra time of patching, as a fraction."""
        return self.patched / self.plain - 1


def patching_overhead(pipe: Any, sites: Sequence[Site], rows: int, rounds: int) -> Overhead:
    """Time both batches in turn, so that a drift of the machine meets both alike, on sites spread over the UNet.

    Args:
        pipe: the pipeline.
        sites: of its UNet; as many as ``rows`` are restored.
        rows: runs of each batch.
        rounds: how often each is timed.
    """
    chosen = [sites[index * len(sites) // rows] for index in range(rows)]
    patched = sweep_request(pipe, [Patch(site) for site in chosen], STEPS, 7.5, "free")
    texts = {f"text {row}": encode_prompt(pipe, f"a photo of {row} apples") for row in range(rows)}
    given = {
        name: (one.embeds, (one.pooled, one.time_ids)) if needs_added(pipe) else one.embeds
        for name, one in texts.items()
    }
    plain = sweep_request(pipe, [()] * rows, STEPS, 7.5, "free", list(given), sources=given)  # type: ignore[list-item]
    times: tuple[list[float], list[float]] = [], []
    for number in range(1 + rounds):
        for request, own in zip((patched, plain), times, strict=True):
            seconds = seconds_of(lambda: run_request(request), 1, warmup=0)  # noqa: B023
            if number:  # the first call of each is its warm-up
                own.append(seconds)
    return Overhead(rows, *map(statistics.median, times))
