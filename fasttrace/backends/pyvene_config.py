"""What a pyvene config means: which interventions, on which sites, and where in them a unit location points.

Activations of pyvene are values ``[units, D]`` at positions of one site, or ``[heads, units, d]`` at positions of
several heads. Here a single site is one head of a kind, so that both are the second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.text.trace import encoder_path
from ..errors import BackendError
from ..patch import ZERO, Add, Patch, Source
from ..sites import Site

OTHERWISE = "run it with pyvene.IntervenableModel"
_COMPONENTS = {"block_output": "hidden", "attention_output": "self_attn", "mlp_output": "mlp"}
_HEADS = "head_attention_value_output"
_ALL_HEADS = "attention_value_output"
_UNITS = {_HEADS: ("h", "h.pos")}
_INSIDE = re.compile(r"(head_)?(query|key|value)_output|attention_weight|(attention|mlp)_input|mlp_activation")
_CONSTANT = ("ZeroIntervention", "NoiseIntervention")
_FROM_SOURCE = ("VanillaIntervention", "AdditionIntervention", "SubtractionIntervention")
_ADDING = ("AdditionIntervention", "SubtractionIntervention", "NoiseIntervention")


@dataclass(frozen=True)
class Place:
    """Where one unit location points: some sites, at some positions of each, or at all where it is ``None``."""

    sites: Sequence[Site]
    positions: list[int] | None


@dataclass(frozen=True)
class Planned:
    """One representation of a config.

    Attributes:
        key: pyvene's name of it.
        sites: one site, or every head of a layer's attention.
        unit: ``"pos"``, ``"h"`` or ``"h.pos"``.
        intervention: the real one, which pyvene made.
        group: number of its source.
        rank: 1 for a block's input, which acts on the block before after its own output's.
    """

    key: str
    sites: tuple[Site, ...]
    unit: str
    intervention: Any
    group: int
    rank: int

    @property
    def kind(self) -> str:
        return type(self.intervention).__name__

    @property
    def adds(self) -> bool:
        return self.kind in _ADDING

    def place(self, locations: Any, row: int) -> Place:
        """Where one prompt's unit locations point.

        Args:
            locations: positions ``[B][units]``, heads ``[B][heads]``, or a pair of heads and positions.
            row: which prompt.

        Raises:
            BackendError: a head that the layer does not have.
        """
        if self.unit == "pos":
            return Place(self.sites, [int(position) for position in locations[row]])
        heads, positions = (locations, None) if self.unit == "h" else locations
        chosen = [int(head) for head in heads[row]]
        outside = [head for head in chosen if not 0 <= head < len(self.sites)]
        if outside:
            raise BackendError(
                f"{self.key}: head {outside[0]} in unit_locations is out of range: expected 0 to {len(self.sites) - 1}"
            )
        sites = tuple(self.sites[head] for head in chosen)
        return Place(sites, None if positions is None else [int(position) for position in positions[row]])

    def constant(self) -> Tensor | None:
        """The values that the intervention brings along, as `shaped` gives them, ``None`` if a source has them."""
        if self.kind == "ZeroIntervention":
            return torch.zeros(1, 1, 1)
        if self.kind == "NoiseIntervention":
            return self.shaped((self.intervention.noise * self.intervention.noise_level)[0])
        own: Tensor | None = self.intervention.source_representation
        return None if own is None else self.shaped(own.reshape(-1, own.shape[-1]))

    def shaped(self, value: Tensor) -> Tensor:
        """Given values ``[units, D]`` or ``[heads, units, d]`` as ``[sites or 1, units, d]``."""
        if value.ndim == 3:
            return value
        if self.unit == "pos" and len(self.sites) > 1:
            return value.reshape(len(value), len(self.sites), -1).transpose(0, 1)
        return value[None]

    def patches(self, place: Place, value: Tensor) -> list[Patch]:
        """Patches that write or add values ``[sites or 1, positions or 1, d]`` at a place.

        Raises:
            BackendError: another number of values than of heads or positions.
        """
        if self.kind == "ZeroIntervention":
            return [Patch(site, place.positions, source=ZERO) for site in place.sites]
        units = value.shape[1] if place.positions is None else len(place.positions)
        if value.shape[0] not in (1, len(place.sites)) or value.shape[1] not in (1, units):
            raise BackendError(
                f"{self.key}: values of shape {list(value.shape)} for {len(place.sites)} sites and {units} positions, "
                "expected as many; pyvene's noise has 4 positions"
            )
        signed = -value if self.kind == "SubtractionIntervention" else value
        signed = signed.expand(len(place.sites), units, -1)

        def source(given: Tensor) -> Source:
            return Add(given) if self.adds else given

        if place.positions is None:
            return [Patch(site, source=source(rows)) for site, rows in zip(place.sites, signed, strict=True)]
        return [
            Patch(site, [position], source=source(row))
            for site, rows in zip(place.sites, signed, strict=True)
            for position, row in zip(place.positions, rows, strict=True)
        ]


def pyvene_model(config: Any, model: Any) -> Any:
    """The real ``IntervenableModel``, which checks the config; it freezes the model's weights, which is undone.

    Raises:
        BackendError: serial mode.
    """
    from pyvene import IntervenableModel

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        own = IntervenableModel(config, model)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    if own.mode != "parallel":
        raise BackendError(f"mode={own.mode!r} is not served, only parallel: {OTHERWISE}")
    return own


def plan_of(own: Any, sites: Sequence[Site]) -> list[Planned]:
    """The representations of a real ``IntervenableModel``, in its own order.

    Args:
        own: the real one.
        sites: every site of its model, heads included.

    Raises:
        BackendError: an intervention, component or unit that is not served.
    """
    group_of = {key: group for group, keys in enumerate(own._intervention_group.values()) for key in keys}
    planned = []
    for key in own.sorted_keys:
        representation, intervention = own.representations[key], own.interventions[key]
        if type(intervention).__name__ not in (*_CONSTANT, *_FROM_SOURCE):
            raise BackendError(f"{key}: {type(intervention).__name__} is not served: {OTHERWISE}")
        if intervention.subspace_partition is not None:
            raise BackendError(f"{key}: only whole vectors are served, no subspaces: {OTHERWISE}")
        units = _UNITS.get(representation.component, ("pos",))
        if representation.unit not in units:
            raise BackendError(
                f"{key}: unit {representation.unit!r} of {representation.component} is not served, only "
                f"{' and '.join(map(repr, units))}: {OTHERWISE}"
            )
        chosen, rank = _sites_of(sites, representation, key)
        planned.append(Planned(key, chosen, representation.unit, intervention, group_of[key], rank))
    return planned


def _sites_of(sites: Sequence[Site], representation: Any, key: str) -> tuple[tuple[Site, ...], int]:
    """The sites of a component, and its rank."""
    component, layer = str(representation.component), representation.layer

    def of(kind: str, layer: int) -> tuple[Site, ...]:
        return tuple(site for site in sites if (site.kind, site.layer) == (kind, layer))

    found: tuple[Site, ...] = ()
    if component == "block_input":
        found = of("hidden", layer - 1)
    elif component in _COMPONENTS:
        found = of(_COMPONENTS[component], layer)
    elif component in (_HEADS, _ALL_HEADS):
        found = of("head", layer)
    elif component.endswith(".output"):
        path = re.sub(r"\[(\d+)\]", r".\1", component.removesuffix(".output"))
        found = tuple(site for site in sites if encoder_path(site.name.partition(".")[2]) == path)
    if found:
        return found, int(component == "block_input")
    why = " (it lies inside what a packed pass computes at once)" if _INSIDE.fullmatch(component) else ""
    raise BackendError(f"{key}: component {component!r} of layer {layer} is not served{why}: {OTHERWISE}")
