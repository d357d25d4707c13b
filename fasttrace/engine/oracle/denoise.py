"""Denoising runs by hooks on the user's own UNet: one run after another, each with a scheduler of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...patch import Patch
from ...pipeline import Condition, timestep_condition
from ...sites import Site
from ..hooks import uncompiled, value_hooks
from ..values import apply_patch

if TYPE_CHECKING:
    from ..requests.denoise import UNetRequest

Values = dict[tuple[int, str], Tensor]
"""Values of one run by step and site, ``[branches, ...]``."""


def trace_unet_oracle(request: UNetRequest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Clean, corrupted, restored and inputs, as `fasttrace.engine.denoise.trace.UNetTrace` describes them."""
    with uncompiled(request.pipe.unet):
        inputs = None
        if request.protocol == "teacher_forced":
            inputs = _denoise(request, _Run(request, request.conditions["corrupted"]))[1]
        copied = {patch.source for patches in request.runs for patch in patches if isinstance(patch.source, str)}
        names = dict.fromkeys(["clean", "corrupted", *sorted(copied)])
        plain = {name: _Run(request, request.conditions[name]) for name in names}
        outputs = {name: _result(request, run, inputs) for name, run in plain.items()}
        sources = {name: run.values for name, run in plain.items()}
        patched = [
            _Run(request, request.conditions[base], patches, sources)
            for base, patches in zip(request.bases, request.runs, strict=True)
        ]
        restored = [_result(request, run, inputs) for run in patched]
    clean = outputs["clean"]
    return clean, outputs["corrupted"], torch.stack(restored) if restored else clean.new_empty(0, *clean.shape), inputs


@dataclass
class _Run:
    """One run: its text, its patches and what they copy from. Without patches it keeps the values that others copy."""

    request: UNetRequest
    condition: Condition
    patches: tuple[Patch, ...] | None = None
    sources: dict[str, Values] = field(default_factory=dict)
    values: Values = field(default_factory=dict)

    def unet(self, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """One call on latents ``[1, C, h, w]``: the output ``[branches, C, h, w]``, unconditional first."""
        request, condition = self.request, self.condition
        rows = [condition] if request.negative is None else [request.negative, condition]
        added = None
        if condition.pooled is not None:
            added = {
                "text_embeds": torch.stack([row.pooled for row in rows if row.pooled is not None]),
                "time_ids": torch.stack([row.time_ids for row in rows if row.time_ids is not None]),
            }
        with value_hooks(self._keepers(step) if self.patches is None else self._overwriters(step)):
            output: Tensor = request.pipe.unet(
                latents.repeat(len(rows), 1, 1, 1),
                timestep,
                encoder_hidden_states=torch.stack([row.embeds for row in rows]),
                timestep_cond=timestep_condition(request.pipe, request.guidance_scale),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return output

    def _keepers(self, step: int) -> list[tuple[Site, Callable[[Tensor], None]]]:
        def keeper(name: str) -> Callable[[Tensor], None]:
            return lambda value: self.values.update({(step, name): value.clone()})

        return [(site, keeper(name)) for name, site in self.request.sites.items()]

    def _overwriters(self, step: int) -> list[tuple[Site, Callable[[Tensor], Tensor]]]:
        def overwriter(patch: Patch) -> Callable[[Tensor], Tensor]:
            def overwrite(value: Tensor) -> Tensor:
                value = value.clone()
                for row in _patched_rows(patch, self.request.branches):
                    named = isinstance(patch.source, str)
                    source = self.sources[str(patch.source)][step, patch.site][row] if named else None
                    value[row] = apply_patch(value[row], patch, source)
                return value

            return overwrite

        now = [patch for patch in self.patches or () if patch.steps is None or step in patch.steps]
        return [(self.request.sites[patch.site], overwriter(patch)) for patch in now if not patch.is_empty]


def _patched_rows(patch: Patch, branches: int) -> list[int]:
    if branches == 1:
        return [0]
    return {"uncond": [0], "cond": [1], "both": [0, 1]}[patch.branch]


def _result(request: UNetRequest, run: _Run, inputs: Tensor | None) -> Tensor:
    """Final latents ``[C, h, w]``; or conditional outputs ``[S, C, h, w]`` where every step's input is given."""
    if inputs is None:
        return _denoise(request, run)[0]
    timesteps = _scheduler(request).timesteps
    return torch.stack([run.unet(step, timesteps[step], read[None])[-1] for step, read in enumerate(inputs)])


def _denoise(request: UNetRequest, run: _Run) -> tuple[Tensor, Tensor]:
    """Final latents ``[C, h, w]``, and what the UNet read at each step ``[S, C, h, w]``; as diffusers' pipelines do."""
    scheduler = _scheduler(request)
    takes = inspect.signature(scheduler.step).parameters
    given: dict[str, Any] = {"eta": request.eta, "generator": request.new_generator()}
    options = {name: value for name, value in given.items() if name in takes}
    latents = request.latents[None] * scheduler.init_noise_sigma
    inputs = []
    for step, timestep in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latents, timestep))
        output = run.unet(step, timestep, inputs[-1])
        if request.branches == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + request.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
    return latents[0], torch.cat(inputs)


def _scheduler(request: UNetRequest) -> Any:
    """A copy of the user's, set to the number of steps."""
    scheduler = copy.deepcopy(request.pipe.scheduler)
    scheduler.set_timesteps(request.num_inference_steps, device=request.latents.device)
    return scheduler
