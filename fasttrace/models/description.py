"""What is known of one model: its list of units, and whether that list is all that the model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .liveness import Liveness, Value, liveness
from .unit import Dims, Forward, SitePoint, Unit


@dataclass(frozen=True, eq=False)
class Description:
    """A model as its list of units.

    Attributes:
        part: of the pipeline, with which the names of its sites begin.
        units: in execution order.
        inputs, outputs: names of the values that a forward begins and ends with.
        runs: whether the units do all that the model does. Where they do not (a block of another class, a hook on a
            module that they bypass), the list still says where sites are, and the model runs by hooks.
        crossing: attention modules whose keys and values come of the text alone, by path: computed once for all steps.
        begin: called once a forward, before its units: makes further constants.
        flow: which values each unit reads, and which live on.
        sites: all sites by name, in execution order.
        order: by name of a site: its place among all sites, in execution order.
        inside: for each unit the names of the sites within it.
        ends: for each unit the sites at its end: name, and name of the value.
        place: by name of a site: the place of its unit.
        brought: by name of a site: what a row that joins there brings.
    """

    part: str
    units: list[Unit]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runs: bool
    crossing: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[Forward], None] = lambda forward: None

    flow: Liveness = field(init=False, repr=False)
    sites: dict[str, SitePoint] = field(init=False, repr=False)
    order: dict[str, int] = field(init=False, repr=False)
    inside: list[tuple[str, ...]] = field(init=False, repr=False)
    ends: list[tuple[tuple[str, str], ...]] = field(init=False, repr=False)
    place: dict[str, int] = field(init=False, repr=False)
    brought: dict[str, frozenset[Value]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Plain attributes, and not computed when first read: compiled graphs are traced through them.
        flow = liveness(self.units, self.inputs, self.outputs)
        inside = [tuple(self.name(site) for site in unit.inside) for unit in self.units]
        ends = [tuple((self.name(site), site.value) for site in unit.sites) for unit in self.units]
        sites = {self.name(site): site for unit in self.units for site in (*unit.inside, *unit.sites)}
        place: dict[str, int] = {}
        brought: dict[str, frozenset[Value]] = {}
        for number, (within, after) in enumerate(zip(inside, ends, strict=True)):
            place |= dict.fromkeys((*within, *(name for name, _ in after)), number)
            brought |= dict.fromkeys(within, flow.live[number])
            # Beside what lives on, each site at this unit's end needs its value, even where nobody reads it.
            values = frozenset((value, number) for _, value in after)
            brought |= {name: flow.live_on[number] | values for name, _ in after}
        order = {name: number for number, name in enumerate(sites)}
        derived = {"flow": flow, "sites": sites, "order": order, "inside": inside, "ends": ends, "place": place,
                   "brought": brought}  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def name(self, site: SitePoint) -> str:
        """A site's name: the part, and the path within it."""
        return f"{self.part}.{site.path}"

    def positions(self, name: str, dims: Dims) -> int:
        """Number of positions of a site's value: tokens, or pixels."""
        shape = self.sites[name].shape(dims)
        return shape[0] if len(shape) == 2 else shape[1] * shape[2]
