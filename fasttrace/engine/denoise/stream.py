"""What flows through a UNet in one call, and how rows join it on the way.

A row that joins at a site equals its parent up to there. So the parent leaves its state behind at that site: the site's
value, what the value is added to, the skip connections so far, the residual of the attention block. The row enters with
that state, in the same call or in a later one, which then need not begin at the UNet's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .runs import Key

AtSite = Callable[[str, Tensor], Tensor]
"""Called with a site and its value; returns what the value becomes."""

Trail = dict[tuple[Key, str, str | int], Tensor]
"""What rows have left behind, ``[1, ...]`` each: by row, by what it is, and by its site, block or number."""


@dataclass(frozen=True)
class Joins:
    """Rows that leave their state behind in a call, and rows that enter with one.

    Attributes:
        parents: for each row of the call the row that it joins; ``None`` for one that is there from the start.
        entering: number of rows that enter at a site.
        leaving: rows that others join.
        places: ``[len(leaving)]`` where those rows are in the call.
        sites: where they leave their state.
    """

    parents: list[Key | None] = field(default_factory=list)
    entering: dict[str, int] = field(default_factory=dict)
    leaving: list[Key] = field(default_factory=list)
    places: Tensor | None = None
    sites: frozenset[str] = frozenset()


@dataclass
class Stream:
    """What flows through the units in one call.

    Attributes:
        x: ``[B, C, h, w]``, or ``[B, P, D]`` within an attention block; rows that enter are appended.
        time: ``[1, E]`` time embedding, or ``[B, E]`` of all rows of the call where conditions are added to it.
        text: ``[B]`` condition of all rows of the call.
        keys: cross-attention keys and values of every condition, by site: ``[K, H, T, d]``.
        embeds: ``[K, T, D]``, for attention that runs as a module.
        at_site: what happens at sites.
        resize: whether feature maps are not halves of each other, so that upsampling must be told the size.
        joins: who leaves and enters.
        trail: where states are left.
        skips: outputs of the way down; ``None`` for one from before the call began.
        residual: what entered the attention block; ``None`` likewise.
    """

    x: Tensor
    time: Tensor
    text: Tensor
    keys: dict[str, tuple[Tensor, Tensor]]
    embeds: Tensor
    at_site: AtSite
    resize: bool
    joins: Joins
    trail: Trail
    skips: list[Tensor | None]
    residual: Tensor | None = None

    def time_now(self) -> Tensor:
        return self.time if self.time.shape[0] == 1 else self.time[: self.x.shape[0]]

    def arrive(self, site: str, value: Tensor | None, adds: bool) -> None:
        """A site's value, ``None`` where the call begins here, is added to ``x`` or takes its place."""
        x: Tensor | None = self.x if adds else None
        if value is not None and site in self.joins.sites:
            self._leave("value", site, value)
            if adds:
                self._leave("x", site, self.x)
        entering = self.joins.entering.get(site)
        if entering:
            rows = self.x.shape[0] + entering
            value = self._grown(value, rows, "value", site)
            x = self._grown(self.x if rows > entering else None, rows, "x", site) if adds else None
        assert value is not None
        value = self.at_site(site, value)
        self.x = value if x is None else x + value

    def push(self) -> None:
        """``x`` is kept for the way up."""
        self._leave("skip", len(self.skips), self.x)
        self.skips.append(self.x)

    def pop(self) -> None:
        """What was kept last joins ``x`` as further channels."""
        number, skip = len(self.skips) - 1, self.skips.pop()
        self.x = torch.cat([self.x, self._grown(skip, self.x.shape[0], "skip", number)], dim=1)

    def skip_size(self) -> torch.Size:
        """Height and width of what was kept last."""
        skip = self.skips[-1]
        if skip is None:
            parent = self.joins.parents[0]
            assert parent is not None
            skip = self.trail[parent, "skip", len(self.skips) - 1]
        return skip.shape[2:]

    def keep_residual(self, block: str) -> Tensor:
        """``x`` is kept for the end of an attention block."""
        self._leave("residual", block, self.x)
        self.residual = self.x
        return self.x

    def take_residual(self, block: str) -> Tensor:
        """What was kept at the block's beginning, for all rows that are there now."""
        residual, self.residual = self._grown(self.residual, self.x.shape[0], "residual", block), None
        return residual

    def _leave(self, what: str, where: str | int, tensor: Tensor) -> None:
        if self.joins.places is not None:
            rows = torch.split(tensor[self.joins.places], 1)
            self.trail.update({(key, what, where): row for key, row in zip(self.joins.leaving, rows, strict=True)})

    def _grown(self, earlier: Tensor | None, rows: int, what: str, where: str | int) -> Tensor:
        """A tensor from before some rows entered, for the first ``rows`` rows of the call."""
        then = 0 if earlier is None else earlier.shape[0]
        if earlier is not None and then == rows:
            return earlier
        entered = [self.trail[key, what, where] for key in self.joins.parents[then:rows] if key is not None]
        return torch.cat([*([] if earlier is None else [earlier]), *entered])
