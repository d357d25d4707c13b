"""Text runs by hooks on the user's own encoder: one forward for clean, corrupted, each source, each restored run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...patch import Patch
from ...sites import Site
from ..hooks import hooks, uncompiled, value_hooks
from ..values import apply_patch, with_first

if TYPE_CHECKING:
    from ..requests.text import TextRequest

Values = dict[str, Tensor]
"""Values of one run by site, ``[T, D]``."""


def trace_text_oracle(request: TextRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Clean ``[T, D]``, corrupted ``[S, T, D]`` and restored ``[S, N, T, D]``; pooled outputs drop ``T``."""
    with uncompiled(request.encoder):
        clean, clean_values = _record(request, request.ids, None)
        others = {name: _record(request, ids, None)[1] for name, ids in request.sources.items()}
        corrupted = clean.new_empty(len(request.noise), *clean.shape)
        restored = clean.new_empty(len(request.noise), len(request.runs), *clean.shape)
        for sample, noise in enumerate(request.noise):
            corrupted[sample], values = _record(request, request.ids, noise)
            sources = {"clean": clean_values, "corrupted": values, **others}
            base = noise if request.base == "corrupted" else None
            for number, run in enumerate(request.runs):
                restored[sample, number] = _patched(request, base, run, sources)
    return clean, corrupted, restored


def _record(request: TextRequest, ids: Tensor, noise: Tensor | None) -> tuple[Tensor, Values]:
    """A run without patches: its output, and its values at every site that some run patches."""
    values: Values = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        return lambda value: values.update({name: value[0].clone()})

    patches = {patch.site: patch for run in request.runs for patch in run}
    pairs = [(request.site_of(patch), keeper(name)) for name, patch in patches.items()]
    with value_hooks(pairs):
        return _output(request, ids, noise), values


def _patched(
    request: TextRequest, noise: Tensor | None, run: tuple[Patch, ...], sources: Mapping[str, Values]
) -> Tensor:
    """The output of a run whose values are overwritten, patch by patch, as the forward makes them."""

    def overwriter(patch: Patch) -> Callable[[Tensor], Tensor]:
        source = sources[patch.source][patch.site] if isinstance(patch.source, str) else None
        return lambda value: apply_patch(value[0], patch, source)[None]

    pairs: list[tuple[Site, Callable[[Tensor], Tensor]]] = [
        (request.site_of(patch), overwriter(patch)) for patch in run if not patch.is_empty
    ]
    with value_hooks(pairs):
        return _output(request, request.ids, noise)


def _output(request: TextRequest, ids: Tensor, noise: Tensor | None) -> Tensor:
    """One forward of the encoder, with whatever hooks are on it, and what the request reads of it."""
    # The head of a language model is called for its answers alone.
    has_head = hasattr(request.encoder, "lm_head")
    model = request.encoder.base_model if has_head and request.output != "logits" else request.encoder
    mask = None if request.attention_mask is None else request.attention_mask[None]
    with _noise_on_words(model, ids, noise), _no_layer_from(request) as inputs:
        result: Any = model(input_ids=ids[None], attention_mask=mask)
    if request.output == "pooled":
        projected: Tensor | None = getattr(result, "text_embeds", None)
        return (result.pooler_output if projected is None else projected)[0]
    if request.output == "logits":
        answers: Tensor = result.logits[0, request.column, request.answers]
        return answers
    states: Tensor = (inputs[0] if request.output == "penultimate" else result.last_hidden_state)[0]
    return states if request.column is None else states[request.column]


@contextlib.contextmanager
def _noise_on_words(model: nn.Module, ids: Tensor, noise: Tensor | None) -> Iterator[None]:
    """Noise ``[T, D]`` on the word embeddings: on what the first embedding gives that is called with the token ids."""
    waiting = [] if noise is None else [noise]

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output + waiting.pop() if waiting and torch.equal(args[0].flatten(), ids) else None

    with hooks([(module, add) for module in model.modules() if isinstance(module, nn.Embedding)]):
        yield


@contextlib.contextmanager
def _no_layer_from(request: TextRequest) -> Iterator[list[Tensor]]:
    """Layers from ``request.depth`` on pass on what they are given, so the final norm reads the last one that counts.

    Their inputs ``[1, T, D]`` are collected: the first of them is what the last layer that counts gave.
    """
    inputs: list[Tensor] = []

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        return with_first(output, inputs[-1])

    layers = [site.module for site in request.sites.values() if site.kind == "hidden"]
    handles = [layer.register_forward_hook(skip, with_kwargs=True) for layer in layers[request.depth :]]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
