"""What is known of one model: its list of units, and whether that list is all that the model does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .liveness import Liveness, liveness
from .unit import Dims, SitePoint, Unit


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
        flow: which values each unit reads, and which live on.
        sites: all sites by name, in execution order.
        order: by name of a site: its place among all sites, in execution order.
        ends: for each unit the sites at its end: name, and name of the value.
        place: by name of a site: the place of its unit.
    """

    part: str
    units: list[Unit]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runs: bool
    crossing: dict[str, Any] = field(default_factory=dict)

    flow: Liveness = field(init=False, repr=False)
    sites: dict[str, SitePoint] = field(init=False, repr=False)
    order: dict[str, int] = field(init=False, repr=False)
    ends: list[tuple[tuple[str, str], ...]] = field(init=False, repr=False)
    place: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Plain attributes, and not computed when first read: compiled graphs are traced through them.
        ends = [tuple((self.name(site), site.value) for site in unit.sites) for unit in self.units]
        sites = {self.name(site): site for unit in self.units for site in unit.sites}
        derived = {
            "flow": liveness(self.units, self.inputs, self.outputs),
            "sites": sites,
            "order": {name: place for place, name in enumerate(sites)},
            "ends": ends,
            "place": {name: place for place, of_unit in enumerate(ends) for name, _ in of_unit},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def name(self, site: SitePoint) -> str:
        """A site's name: the part, and the path within it."""
        return f"{self.part}.{site.path}"

    def positions(self, name: str, dims: Dims) -> int:
        """Number of positions of a site's value: tokens, or pixels."""
        shape = self.sites[name].shape(dims)
        return shape[0] if len(shape) == 2 else shape[1] * shape[2]
