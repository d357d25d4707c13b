"""What one row of a denoiser costs, in operations up to each site and in bytes: from its units, without a forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...models.description import Description
from ...models.liveness import Value
from ...models.unit import Dims


@dataclass(frozen=True)
class Cost:
    """Cost of one row.

    Attributes:
        flops: of the whole forward; a multiply and an add are two. Keys and values of the text are not counted, since
            they are computed once for all steps.
        flops_to: by site, of what is computed by the time the site's value is there.
        widest: numbers that are alive at once where memory is highest, skip connections included.
    """

    flops: float
    flops_to: dict[str, float]
    widest: int

    def suffix(self, site: str) -> float:
        """Share of a forward that remains for a row that joins at a site."""
        return 1 - self.flops_to[site] / self.flops


def cost_of(model: Description, dims: Dims) -> Cost:
    """Cost of one row, on any device, ``meta`` included."""
    flops, flops_to, widest = 0.0, dict[str, float](), 0
    sizes: dict[Value, int] = {}
    for place, unit in enumerate(model.units):
        flops += unit.flops(dims)
        flops_to |= dict.fromkeys((*model.inside[place], *(name for name, _ in model.ends[place])), flops)
        for name, shape in zip(unit.writes, unit.shapes, strict=False):
            sizes[name, place] = math.prod(shape(dims))
        lives_on = sum(sizes.get(value, 0) for value in model.flow.live_on[place])
        widest = max(widest, unit.alive(dims) + lives_on)
    return Cost(flops, flops_to, widest)
