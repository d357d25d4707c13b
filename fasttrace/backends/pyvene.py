"""pyvene's interventions as patches, and `FastIntervenable` in the place of its ``IntervenableModel``.

Served: ``VanillaIntervention`` (interchange), ``ZeroIntervention``, ``AdditionIntervention``,
``SubtractionIntervention`` and ``NoiseIntervention``, in parallel mode, at token positions (unit ``"pos"``) of
``block_input`` (from layer 1 on), ``block_output``, ``attention_output``, ``attention_value_output``, ``mlp_output``,
or of those modules by path (``"model.layers[3].mlp.output"``); and at heads (units ``"h"`` and ``"h.pos"``) of
``head_attention_value_output``. Anything else is refused, and named as a matter for pyvene's own class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.hooks import uncompiled, value_hooks
from ..errors import BackendError
from ..patch import Patch
from .base import Backend, Sweep, tokens_read
from .pyvene_config import OTHERWISE, Place, plan_of, pyvene_model


@dataclass(frozen=True)
class Prompts:
    """One base prompt, the patched runs over it, and the only token that is read, if it is one."""

    input_ids: Tensor
    attention_mask: Tensor | None
    runs: Sequence[tuple[Patch, ...]]
    position: int | None


class PyveneBackend(Backend[Prompts]):
    """Final states ``[n, T, D]``, or ``[n, D]``, of patched runs over one prompt."""

    def sweep(self, request: Prompts) -> Sweep:
        return Sweep(request.input_ids, request.runs, None, "clean", {}, request.attention_mask, request.position)

    def score(self, request: Prompts, states: Tensor) -> Tensor:
        return states[0]


class FastIntervenable:
    """``pyvene.IntervenableModel`` for the interventions above: the same call, the same outputs.

    Args:
        config: a ``pyvene.IntervenableConfig``, or what pyvene takes for one.
        model: a causal language model or a text encoder of transformers; left unchanged.
        batch_size: runs that are held at once, as in `Backend`.

    Raises:
        BackendError: an intervention, component, unit or mode that is not served.
    """

    def __init__(self, config: Any, model: Any, batch_size: int | None = None) -> None:
        self._backend = PyveneBackend(model, batch_size)
        self._cell = _Cell(config, self._backend)

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
            source_representations: values ``[B, units, D]``, or ``[B, heads, units, d]`` of heads, instead of sources:
                by key, in order, or one for all.
            subspaces, labels: refused unless ``None``.
            output_original_output: also return the base run's outputs.
            return_dict: return a ``pyvene.IntervenableModelOutput``.
            use_cache: ignored; there is nothing to generate.

        Returns:
            ``(original outputs or None, outputs)``; outputs have ``logits`` ``[B, T, vocabulary]``, or
            ``last_hidden_state`` ``[B, T, D]`` where the model has no head.
        """
        if subspaces is not None or labels is not None:
            raise BackendError(f"subspaces and labels are not served: {OTHERWISE}")
        cells = [self._cell.patches(base, sources, unit_locations, source_representations, {})]
        found = next(iter(_outputs(self._backend, base, cells, None)))
        from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

        original = self._backend.model(**base) if output_original_output else None
        patched = CausalLMOutput(logits=found) if self._backend.has_head else BaseModelOutput(last_hidden_state=found)
        if return_dict:
            from pyvene.models.intervenable_base import IntervenableModelOutput

            return IntervenableModelOutput(original_outputs=original, intervened_outputs=patched)
        return original, patched


_Recorded = dict[int, tuple[Any, dict[str, Tensor]]]
"""Values of every site, by the identity of a source; the source itself is kept so that the identity stays its own."""


class _Cell:
    """One config on a backend's model."""

    def __init__(self, config: Any, backend: PyveneBackend) -> None:
        self._backend = backend
        self._own = pyvene_model(config, backend.model)
        self._planned = plan_of(self._own, backend.sites)

    def patches(
        self, base: Mapping[str, Tensor], sources: Any, unit_locations: Any, representations: Any, cache: _Recorded
    ) -> list[tuple[Patch, ...]]:
        """One tuple of patches for each base prompt; the arguments are those of a `FastIntervenable`'s call."""
        batch = len(base["input_ids"])
        locations = self._own._broadcast_unit_locations(batch, unit_locations)
        at_source, at_base = locations["sources->base"]
        given = self._own._broadcast_source_representations(representations)
        listed = [None] * len(self._own._intervention_group) if sources is None else _as_list(sources)
        listed = self._own._broadcast_sources(listed)
        order = {key: index for index, key in enumerate(self._own.sorted_keys)}
        runs: list[list[Patch]] = [[] for _ in range(batch)]
        for planned in sorted(self._planned, key=lambda p: p.rank):
            number = order[planned.key]
            if at_base is None or at_base[number] is None:
                raise BackendError(f"{planned.key} has no positions in the base: give unit_locations, or {OTHERWISE}")
            constant = planned.constant()
            for row in range(batch):
                value = constant
                if value is None and given is not None:
                    if planned.key not in given:
                        continue
                    value = given[planned.key]
                    value = planned.shaped(value[row] if value.ndim > 2 else value)
                elif value is None:
                    source = listed[planned.group]
                    if source is None:
                        continue
                    if at_source is None or at_source[number] is None:
                        raise BackendError(f"{planned.key} has no positions in its source: give unit_locations of both")
                    place = planned.place(at_source[number], row)
                    value = _recorded(self._backend, source, place, row, cache)
                runs[row] += planned.patches(planned.place(at_base[number], row), value)
        return [tuple(run) for run in runs]


def to_patches(config: Any, unit_locations: Mapping[str, Any], model: Any) -> list[Patch]:
    """The patches that a config means for one base prompt.

    Args:
        config: a ``pyvene.IntervenableConfig``.
        unit_locations: as pyvene takes them; source and base positions must be the same (`FastIntervenable` copies
            between different ones too).
        model: the causal language model or text encoder of transformers that the config is for: its layers and heads
            are the sites of the patches, and pyvene checks the config against it. It is left unchanged.

    Returns:
        One patch a representation, or one a head of it, with sources ``"source0"``, ``"source1"``, ... by group, to be
        named so in ``trace_text(..., sources=...)``.

    Raises:
        BackendError: an intervention, component, unit or mode that is not served, or positions that differ.
    """
    own = pyvene_model(config, model)
    at_source, at_base = own._broadcast_unit_locations(1, unit_locations)["sources->base"]
    patches = []
    for number, planned in enumerate(plan_of(own, PyveneBackend(model).sites)):
        place = planned.place(at_base[number], 0)
        value = planned.constant()
        if value is not None:
            patches += planned.patches(place, value)
            continue
        if planned.place(at_source[number], 0) != place or planned.adds:
            raise BackendError(f"{planned.key}: a patch copies a position to itself; use FastIntervenable for others")
        patches += [Patch(site, place.positions, source=f"source{planned.group}") for site in place.sites]
    return patches


@torch.no_grad()
def intervene_many(
    model: Any,
    cells: Sequence[tuple[Any, Mapping[str, Any]]],
    base: Mapping[str, Tensor],
    sources: Any = None,
    *,
    logit_positions: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Iterator[Tensor]:
    """A sweep: many ``(config, unit_locations)`` over the same base and sources, in packed passes.

    Args:
        model: a causal language model of transformers.
        cells: what `FastIntervenable` would take one by one.
        base, sources: as for `FastIntervenable`.
        logit_positions: the only tokens to give logits of.
        batch_size: cells that are held at once; by default as many as fit in a fixed budget of memory.

    Yields:
        Each cell's logits ``[B, T, vocabulary]``, or ``[B, len(logit_positions), vocabulary]``, in order; last hidden
        states where the model has no head.
    """
    backend, recorded = PyveneBackend(model, batch_size), _Recorded()
    rows, length = base["input_ids"].shape
    read = tokens_read(logit_positions, length)
    size = backend.runs_at_once(length, rows * (length if read is None or len(read) > 1 else 1))
    for start in range(0, len(cells), size):
        patched = [
            _Cell(config, backend).patches(base, sources, locations, None, recorded)
            for config, locations in cells[start : start + size]
        ]
        yield from _outputs(backend, base, patched, read)


def _outputs(
    backend: PyveneBackend,
    base: Mapping[str, Tensor],
    cells: Sequence[Sequence[tuple[Patch, ...]]],
    positions: list[int] | None,
) -> Iterator[Tensor]:
    """Logits (states, without a head) of each cell, which has one tuple of patches for each base prompt."""
    mask = base.get("attention_mask")
    only = positions[0] if positions is not None and len(positions) == 1 else None
    states = torch.stack(
        [
            backend.run(Prompts(ids, None if mask is None else mask[row], [cell[row] for cell in cells], only))
            for row, ids in enumerate(base["input_ids"])
        ],
        dim=1,
    )
    if positions is not None:
        states = states[:, :, positions] if only is None else states[:, :, None]
    yield from backend.logits_of_each(states) if backend.has_head else states


def _as_list(sources: Any) -> list[Any]:
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def _recorded(backend: PyveneBackend, source: Any, place: Place, row: int, cache: _Recorded) -> Tensor:
    """Values ``[sites, positions, d]`` in one row of a source's run; one forward records every site.

    Raises:
        BackendError: a prompt or a position that the source does not have.
    """
    rows, length = source["input_ids"].shape
    if row >= rows:
        raise BackendError(f"a source has {rows} prompts, expected as many as the base: there is none for number {row}")
    outside = [position for position in place.positions or () if not 0 <= position < length]
    if outside:
        raise BackendError(
            f"unit_locations: source position {outside[0]} is out of range: expected 0 to {length - 1}, the source has "
            f"{length} tokens"
        )
    if id(source) not in cache:
        values: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda value: values.__setitem__(name, value.clone())

        with uncompiled(backend.model), value_hooks([(site, keep(site.name)) for site in backend.sites]):
            backend.model(**source)
        cache[id(source)] = source, values
    own = [cache[id(source)][1][site.name][row] for site in place.sites]
    return torch.stack(own if place.positions is None else [value[place.positions] for value in own])
