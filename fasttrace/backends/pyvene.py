"""pyvene's interventions as patches, and `FastIntervenable` in the place of its ``IntervenableModel``.

Served: ``VanillaIntervention`` (interchange), ``ZeroIntervention``, ``AdditionIntervention``,
``SubtractionIntervention`` and ``NoiseIntervention``, in parallel mode, at token positions (unit ``"pos"``) of
``block_input`` (from layer 1 on), ``block_output``, ``attention_output``, ``mlp_output``, or of those modules by path
(``"model.layers[3].mlp.output"``). Anything else is refused, and named as a matter for pyvene's own class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.oracle import hooks
from ..engine.text import encoder_path
from ..engine.values import first
from ..errors import BackendError
from ..patch import ZERO, Add, Patch, Source
from ..sites import Site, part_sites
from .base import Backend, Sweep

_COMPONENTS = {"block_output": "hidden", "attention_output": "self_attn", "mlp_output": "mlp"}
_OTHERWISE = "run it with pyvene.IntervenableModel"


@dataclass(frozen=True)
class Prompts:
    """One base prompt and the patched runs over it."""

    input_ids: Tensor
    attention_mask: Tensor | None
    runs: Sequence[tuple[Patch, ...]]


@dataclass(frozen=True)
class Planned:
    """One representation of a config: where it acts, and the real intervention that pyvene made for it."""

    key: str
    site: Site
    intervention: Any
    group: int
    rank: int


class PyveneBackend(Backend[Prompts]):
    """Final states ``[n, T, D]`` of patched runs over one prompt."""

    def sweep(self, request: Prompts) -> Sweep:
        return Sweep(request.input_ids, request.runs, base="clean", attention_mask=request.attention_mask)

    def score(self, request: Prompts, states: Tensor) -> Tensor:
        return states[0]


class FastIntervenable:
    """``pyvene.IntervenableModel`` for the interventions above: the same call, the same outputs.

    Args:
        config: a ``pyvene.IntervenableConfig``, or what pyvene takes for one.
        model: a causal language model of transformers; left unchanged.
        batch_size: runs whose final states are held at once.

    Raises:
        BackendError: an intervention, component, unit or mode that is not served.
    """

    def __init__(self, config: Any, model: Any, batch_size: int = 256) -> None:
        self._backend = PyveneBackend(model, batch_size)
        self._own = _pyvene_model(config, model)
        self._planned = _plan(self._own, model)

    @torch.no_grad()
    def __call__(
        self,
        base: Mapping[str, Tensor],
        sources: Any = None,
        unit_locations: Mapping[str, Any] | None = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Run the base prompts with the interventions.

        Args:
            base: ``input_ids`` (and ``attention_mask``) ``[B, T]``.
            sources: inputs like ``base``, one for each group of representations, or one for all.
            unit_locations: ``{"sources->base": (source positions, base positions)}`` or ``{"base": positions}``, in any
                of pyvene's forms.
            source_representations: values ``[B, units, D]`` instead of sources: by key, in order, or one for all.
            subspaces, labels: refused unless ``None``.
            output_original_output: also return the base run's outputs.
            return_dict: return a ``pyvene.IntervenableModelOutput``.
            use_cache: ignored; there is nothing to generate.

        Returns:
            ``(original outputs or None, outputs)``; outputs have ``logits`` ``[B, T, vocabulary]``.
        """
        if subspaces is not None or labels is not None:
            raise BackendError(f"subspaces and labels are not served: {_OTHERWISE}")
        cells = [self._patches(base, sources, unit_locations, source_representations, {})]
        logits = next(iter(_logits(self._backend, base, cells, None)))
        from transformers.modeling_outputs import CausalLMOutput

        original = self._backend.model(**base) if output_original_output else None
        patched = CausalLMOutput(logits=logits)
        if return_dict:
            from pyvene.models.intervenable_base import IntervenableModelOutput

            return IntervenableModelOutput(original_outputs=original, intervened_outputs=patched)
        return original, patched

    def _patches(
        self, base: Mapping[str, Tensor], sources: Any, unit_locations: Any, representations: Any, cache: _Recorded
    ) -> list[tuple[Patch, ...]]:
        """One tuple of patches for each base prompt."""
        batch = len(base["input_ids"])
        locations = self._own._broadcast_unit_locations(batch, unit_locations)
        at_source, at_base = locations["sources->base"]
        given = self._own._broadcast_source_representations(representations)
        listed = [None] * len(self._own._intervention_group) if sources is None else list(_as_list(sources))
        listed = self._own._broadcast_sources(listed)
        order = {key: index for index, key in enumerate(self._own.sorted_keys)}
        runs: list[list[Patch]] = [[] for _ in range(batch)]
        for planned in sorted(self._planned, key=lambda p: p.rank):
            number = order[planned.key]
            if at_base is None or at_base[number] is None:
                raise BackendError(f"{planned.key} has no positions in the base: give unit_locations, or {_OTHERWISE}")
            for row in range(batch):
                positions = [int(p) for p in at_base[number][row]]
                value = _constant(planned.intervention)
                if value is None and given is not None:
                    if planned.key not in given:
                        continue
                    value = given[planned.key]
                    value = value[row] if value.ndim == 3 else value
                elif value is None:
                    source = listed[planned.group]
                    if source is None:
                        continue
                    recorded = _record(self._backend.model, source, planned.site, cache)
                    value = recorded[row][[int(p) for p in at_source[number][row]]]
                runs[row] += _as_patches(planned, positions, value)
        return [tuple(run) for run in runs]


_Recorded = dict[int, tuple[Any, dict[str, Tensor]]]
"""Values of every site, by the identity of a source; the source itself is kept so that the identity stays its own."""


def to_patches(config: Any, unit_locations: Mapping[str, Any], model: Any) -> list[Patch]:
    """The patches that a config means for one base prompt.

    Args:
        config: a ``pyvene.IntervenableConfig``.
        unit_locations: as pyvene takes them; source and base positions must be the same (`FastIntervenable` copies
            between different ones too).
        model: the model, for its layers.

    Returns:
        One patch a representation, with sources ``"source0"``, ``"source1"``, ... by group, to be named so in
        ``trace_text(..., sources=...)``.

    Raises:
        BackendError: an intervention, component, unit or mode that is not served, or positions that differ.
    """
    own = _pyvene_model(config, model)
    at_source, at_base = own._broadcast_unit_locations(1, unit_locations)["sources->base"]
    patches = []
    for number, planned in enumerate(_plan(own, model)):
        positions = [int(p) for p in at_base[number][0]]
        value = _constant(planned.intervention)
        if value is not None:
            patches += _as_patches(planned, positions, value)
            continue
        if [int(p) for p in at_source[number][0]] != positions or _adds(planned.intervention):
            raise BackendError(f"{planned.key}: a patch copies a position to itself; use FastIntervenable for others")
        patches.append(Patch(planned.site, positions, source=f"source{planned.group}"))
    return patches


@torch.no_grad()
def intervene_many(
    model: Any,
    cells: Sequence[tuple[Any, Mapping[str, Any]]],
    base: Mapping[str, Tensor],
    sources: Any = None,
    *,
    logit_positions: Sequence[int] | None = None,
    batch_size: int = 256,
) -> Iterator[Tensor]:
    """A sweep: many ``(config, unit_locations)`` over the same base and sources, in packed passes.

    Args:
        model: a causal language model of transformers.
        cells: what `FastIntervenable` would take one by one.
        base, sources: as for `FastIntervenable`.
        logit_positions: the only tokens to give logits of.
        batch_size: cells whose final states are held at once.

    Yields:
        Each cell's logits ``[B, T, vocabulary]``, or ``[B, len(logit_positions), vocabulary]``, in order.
    """
    backend, recorded = PyveneBackend(model, batch_size), _Recorded()
    for start in range(0, len(cells), batch_size):
        patched = [
            FastIntervenable(config, model)._patches(base, sources, locations, None, recorded)
            for config, locations in cells[start : start + batch_size]
        ]
        yield from _logits(backend, base, patched, logit_positions)


def _logits(
    backend: PyveneBackend,
    base: Mapping[str, Tensor],
    cells: Sequence[Sequence[tuple[Patch, ...]]],
    positions: Sequence[int] | None,
) -> Iterator[Tensor]:
    mask = base.get("attention_mask")
    states = torch.stack(
        [
            backend.run(Prompts(ids, None if mask is None else mask[row], [cell[row] for cell in cells]))
            for row, ids in enumerate(base["input_ids"])
        ],
        dim=1,
    )
    for cell in states:
        yield backend.logits(cell if positions is None else cell[:, list(positions)])


def _as_list(sources: Any) -> list[Any]:
    return sources if isinstance(sources, list) else [sources]


def _pyvene_model(config: Any, model: Any) -> Any:
    """The real ``IntervenableModel``, which checks the config; it freezes the model's weights, which is undone."""
    from pyvene import IntervenableModel

    trainable = [parameter.requires_grad for parameter in model.parameters()]
    try:
        own = IntervenableModel(config, model)
    finally:
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)
    if own.mode != "parallel":
        raise BackendError(f"mode={own.mode!r} is not served, only parallel: {_OTHERWISE}")
    return own


def _plan(own: Any, model: Any) -> list[Planned]:
    sites = part_sites(model, "model")
    group_of = {key: group for group, keys in enumerate(own._intervention_group.values()) for key in keys}
    planned = []
    for key in own.sorted_keys:
        representation, intervention = own.representations[key], own.interventions[key]
        if type(intervention).__name__ not in (*_CONSTANT, *_FROM_SOURCE):
            raise BackendError(f"{key}: {type(intervention).__name__} is not served: {_OTHERWISE}")
        if representation.unit != "pos" or intervention.subspace_partition is not None:
            raise BackendError(f"{key}: only whole vectors at positions (unit='pos') are served: {_OTHERWISE}")
        site, rank = _site(sites, representation, key)
        planned.append(Planned(key, site, intervention, group_of[key], rank))
    return planned


def _site(sites: Sequence[Site], representation: Any, key: str) -> tuple[Site, int]:
    """The site of a component; rank 1 for a block's input, which acts on the block before after its own output's."""
    component, layer = str(representation.component), representation.layer
    by_kind = {(site.kind, site.layer): site for site in sites}
    if component == "block_input" and ("hidden", layer - 1) in by_kind:
        return by_kind["hidden", layer - 1], 1
    if component in _COMPONENTS and (_COMPONENTS[component], layer) in by_kind:
        return by_kind[_COMPONENTS[component], layer], 0
    if component.endswith(".output"):
        path = re.sub(r"\[(\d+)\]", r".\1", component.removesuffix(".output"))
        for site in sites:
            if encoder_path(site.name.partition(".")[2]) == path:
                return site, 0
    raise BackendError(f"{key}: component {component!r} of layer {layer} is not served: {_OTHERWISE}")


_CONSTANT = ("ZeroIntervention", "NoiseIntervention")
_FROM_SOURCE = ("VanillaIntervention", "AdditionIntervention", "SubtractionIntervention")


def _constant(intervention: Any) -> Tensor | None:
    """Values ``[units, D]`` or ``[1, D]`` that an intervention brings along, ``None`` if they come from a source."""
    name = type(intervention).__name__
    if name == "ZeroIntervention":
        return torch.zeros(1, 1)
    if name == "NoiseIntervention":
        noise: Tensor = (intervention.noise * intervention.noise_level)[0]
        return noise
    own: Tensor | None = intervention.source_representation
    return None if own is None else own.reshape(-1, own.shape[-1])


def _adds(intervention: Any) -> bool:
    return type(intervention).__name__ in ("AdditionIntervention", "SubtractionIntervention", "NoiseIntervention")


def _as_patches(planned: Planned, positions: Sequence[int], value: Tensor) -> list[Patch]:
    """Patches that write or add ``value`` ``[units, D]``, or ``[1, D]`` for all units, at positions."""
    name = type(planned.intervention).__name__
    if name == "ZeroIntervention":
        return [Patch(planned.site, positions, source=ZERO)]
    if len(value) not in (1, len(positions)):
        raise BackendError(
            f"{planned.key}: {len(value)} values for {len(positions)} positions, expected as many; pyvene's noise has 4"
        )
    signed = -value if name == "SubtractionIntervention" else value
    rows = signed.expand(len(positions), -1)

    def source(row: Tensor) -> Source:
        return Add(row) if _adds(planned.intervention) else row

    return [Patch(planned.site, [position], source=source(row)) for position, row in zip(positions, rows, strict=True)]


def _record(model: Any, source: Any, site: Site, cache: _Recorded) -> Tensor:
    """A site's value ``[B, T, D]`` in a source's run; one forward records every site."""
    if id(source) not in cache:
        values: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, output: values.__setitem__(name, first(output).clone())

        with hooks([(each.module, keep(each.name)) for each in part_sites(model, "model")]):
            model(**source)
        cache[id(source)] = source, values
    return cache[id(source)][1][site.name]
