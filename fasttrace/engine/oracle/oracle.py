"""The truth: plain forward hooks on the user's own modules, one run at a time, nothing shared between runs.

Every fast path is held equal to this file. It is written to be obviously right, not to be quick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...models.text.families import text_body, text_model, word_embedding
from ...patch import Patch
from ...pipeline import Condition
from ...sites import Site
from ..denoise.trace import UNetRequest
from ..denoise.trajectory import Trajectories
from ..text.request import TextRequest, encoder_path
from ..values import apply_patch, first, value_hooks, with_first


@contextlib.contextmanager
def hooks(pairs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks that are gone afterwards, whatever happens."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_text_oracle(request: TextRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Clean ``[T, D]``, corrupted ``[S, T, D]`` and restored ``[S, N, T, D]``; pooled outputs drop ``T``."""
    names = {patch.site for run in request.runs for patch in run}
    clean, clean_values = _text_run(request, request.ids, None, (), {}, names)
    other_values = {name: _text_run(request, ids, None, (), {}, names)[1] for name, ids in request.sources.items()}
    corrupted, restored = [], []
    for noise in request.noise:
        output, values = _text_run(request, request.ids, noise, (), {}, names)
        sources = {"clean": clean_values, "corrupted": values, **other_values}
        base_noise = noise if request.base == "corrupted" else None
        corrupted.append(output)
        runs = [_text_run(request, request.ids, base_noise, run, sources, set())[0] for run in request.runs]
        restored.append(torch.stack(runs) if runs else output.new_empty(0, *output.shape))
    if not corrupted:
        return clean, clean.new_empty(0, *clean.shape), clean.new_empty(0, len(request.runs), *clean.shape)
    return clean, torch.stack(corrupted), torch.stack(restored)


def _text_run(
    request: TextRequest,
    ids: Tensor,
    noise: Tensor | None,
    patches: tuple[Patch, ...],
    sources: dict[str, dict[str, Tensor]],
    record: set[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One encoder call: its output, and the values of the sites in ``record``."""
    encoder, values = request.encoder, {}
    corrupt: list[tuple[nn.Module, Callable[..., Any]]] = []
    if noise is not None:
        corrupt.append((word_embedding(encoder), lambda module, args, output: output + noise))
    pairs: list[tuple[Site, Callable[[Tensor], Tensor | None]]] = []
    for name in record:

        def keep(value: Tensor, name: str = name) -> None:
            values[name] = value[0].clone()

        pairs.append((request.sites[encoder_path(name)], keep))
    for patch in patches:
        if patch.is_empty:
            continue

        def overwrite(value: Tensor, patch: Patch = patch) -> Tensor:
            source = sources[patch.source].get(patch.site) if isinstance(patch.source, str) else None
            return apply_patch(value[0], patch, source)[None]

        pairs.append((request.site_of(patch), overwrite))
    with hooks(corrupt), value_hooks(pairs), _layer_inputs(request) as inputs:
        mask = None if request.attention_mask is None else request.attention_mask[None]
        # A language model's head is called for its answers alone.
        model = text_body(encoder) if request.output == "last" else encoder
        result = model(input_ids=ids[None], attention_mask=mask)
    read = slice(None) if request.column is None else request.column
    if request.output == "penultimate":
        return inputs[request.depth][0][read], values
    if request.output == "pooled":
        pooled = getattr(result, "text_embeds", None)
        return (pooled if pooled is not None else result.pooler_output)[0], values
    if request.output == "logits":
        return result.logits[0, request.column, request.answers], values
    if request.depth < len(inputs):
        return text_model(encoder).final_norm(inputs[request.depth])[0][read], values
    return result.last_hidden_state[0][read], values


@contextlib.contextmanager
def _layer_inputs(request: TextRequest) -> Iterator[list[Tensor]]:
    """Every layer's input, read by a pre-hook: ``hidden_states`` are recorded before hooks on a layer run."""
    seen: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    layers = [site.module for site in request.sites.values() if site.kind == "hidden"]
    handles = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


Values = dict[tuple[int, str], Tensor]
"""Recorded values of one run by step and site: ``[branches, ...]``."""


def trace_unet_oracle(request: UNetRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Clean, corrupted and restored, as `fasttrace.engine.denoise.trace.UNetTrace` describes them."""
    forced = corrupted_inputs(request) if request.protocol == "teacher_forced" else None
    values: dict[str, Values] = {}
    outputs: dict[str, Tensor] = {}
    used = {patch.source for run in request.runs for patch in run if isinstance(patch.source, str)}
    for name in {"clean": None, "corrupted": None, **dict.fromkeys(sorted(used))}:
        values[name] = {}
        outputs[name] = _unet_run(request, request.conditions[name], (), {}, values[name], forced)
    restored = [
        _unet_run(request, request.conditions[base], run, values, None, forced)
        for base, run in zip(request.bases, request.runs, strict=True)
    ]
    clean, corrupted = outputs["clean"], outputs["corrupted"]
    return clean, corrupted, torch.stack(restored) if restored else clean.new_empty(0, *clean.shape)


def corrupted_inputs(request: UNetRequest) -> list[Tensor]:
    """The corrupted run's latents as the UNet reads them, at every step: ``[1, C, h, w]`` each."""
    inputs: list[Tensor] = []
    _denoise(request, request.conditions["corrupted"], (), {}, None, inputs)
    return inputs


def _unet_run(
    request: UNetRequest,
    condition: Condition,
    patches: tuple[Patch, ...],
    sources: dict[str, Values],
    record: Values | None,
    forced: list[Tensor] | None,
) -> Tensor:
    """One run: final latents, or the conditional outputs of every step at the latents in ``forced``."""
    if forced is None:
        return _denoise(request, condition, patches, sources, record, None)
    timesteps = Trajectories(*_start(request)).timesteps
    outputs = [
        _call(request, condition, forced[step], timesteps[step], step, patches, sources, record)[-1]
        for step in range(request.steps)
    ]
    return torch.stack(outputs)


def _start(request: UNetRequest) -> tuple[Any, int, Tensor, torch.Generator, int, float]:
    generator = request.new_generator()
    return request.pipe.scheduler, request.num_inference_steps, request.latents, generator, 1, request.eta


def _denoise(
    request: UNetRequest,
    condition: Condition,
    patches: tuple[Patch, ...],
    sources: dict[str, Values],
    record: Values | None,
    inputs: list[Tensor] | None,
) -> Tensor:
    run = Trajectories(*_start(request))
    for step in range(request.steps):
        scaled = run.model_input(step)
        if inputs is not None:
            inputs.append(scaled)
        output = _call(request, condition, scaled, run.timesteps[step], step, patches, sources, record)
        if request.branches == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + request.guidance_scale * (conditional - unconditional)
        run.advance(step, output)
    return run.latents[0]


def _call(
    request: UNetRequest,
    condition: Condition,
    scaled: Tensor,
    timestep: Tensor,
    step: int,
    patches: tuple[Patch, ...],
    sources: dict[str, Values],
    record: Values | None,
) -> Tensor:
    """One UNet call on ``[unconditional, conditional]`` or the conditional alone, patched or recorded."""
    pairs: list[tuple[nn.Module, Callable[..., Any]]] = []
    if record is not None:
        for name, site in request.sites.items():

            def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                record[step, name] = first(output).clone()

            pairs.append((site.module, keep))
    for patch in patches:
        if patch.is_empty or (patch.steps is not None and step not in patch.steps):
            continue

        def overwrite(module: nn.Module, args: Any, output: Any, patch: Patch = patch) -> Any:
            value = first(output).clone()
            for row in _patched_rows(patch, request.branches):
                source = sources[patch.source][step, patch.site][row] if isinstance(patch.source, str) else None
                value[row] = apply_patch(value[row], patch, source)
            return with_first(output, value)

        pairs.append((request.sites[patch.site].module, overwrite))
    rows = [condition] if request.negative is None else [request.negative, condition]
    added = None
    if condition.pooled is not None:
        added = {
            "text_embeds": torch.stack([row.pooled for row in rows if row.pooled is not None]),
            "time_ids": torch.stack([row.time_ids for row in rows if row.time_ids is not None]),
        }
    with hooks(pairs):
        output: Tensor = request.pipe.unet(
            scaled.repeat(len(rows), 1, 1, 1),
            timestep,
            encoder_hidden_states=torch.stack([row.embeds for row in rows]),
            timestep_cond=timestep_condition(request),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return output


def _patched_rows(patch: Patch, branches: int) -> list[int]:
    if branches == 1:
        return [0]
    return {"uncond": [0], "cond": [1], "both": [0, 1]}[patch.branch]


def timestep_condition(request: UNetRequest) -> Tensor | None:
    """The guidance scale as an embedding ``[1, E]`` for models that take it as an input (LCM), else ``None``."""
    width = request.pipe.unet.config.time_cond_proj_dim
    if width is None:
        return None
    scale = torch.tensor([request.guidance_scale - 1])
    embedding: Tensor = request.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
    return embedding.to(request.latents.device, request.latents.dtype)
