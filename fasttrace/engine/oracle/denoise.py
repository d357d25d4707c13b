"""Denoising runs by hooks on the user's own model: one run after another, each with a scheduler of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...patch import Patch
from ...pipeline import Condition, Conditions
from ...sites import Site
from ..hooks import uncompiled, value_hooks
from ..values import apply_patch

if TYPE_CHECKING:
    from ..requests.denoise import DenoiserRequest

Values = dict[tuple[int, str], Tensor]
"""Values of one run by step and site, ``[branches, ...]``."""


def trace_oracle(request: DenoiserRequest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Clean, corrupted, restored and inputs, as `fasttrace.engine.denoise.trace.DenoiserTrace` describes them."""
    with uncompiled(request.denoiser.model):
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

    request: DenoiserRequest
    condition: Condition
    patches: tuple[Patch, ...] | None = None
    sources: dict[str, Values] = field(default_factory=dict)
    values: Values = field(default_factory=dict)

    def call(self, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """One call on latents ``[1, ...]``: the output ``[branches, ...]``, unconditional first."""
        request, condition = self.request, self.condition
        rows = [condition] if request.negative is None else [request.negative, condition]
        denoiser, guidance = request.denoiser, request.denoiser.guidance(request.guidance_scale)
        sample = torch.cat([latents] * len(rows))
        with value_hooks(self._keepers(step) if self.patches is None else self._overwriters(step)):
            return denoiser.call(denoiser.model, sample, timestep, Conditions.of(rows), guidance, request.size)

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


def _result(request: DenoiserRequest, run: _Run, inputs: Tensor | None) -> Tensor:
    """Final latents; or conditional outputs ``[S, ...]`` where every step's input is given."""
    if inputs is None:
        return _denoise(request, run)[0]
    timesteps = _scheduler(request).timesteps
    return torch.stack([run.call(step, timesteps[step], read[None])[-1] for step, read in enumerate(inputs)])


def _denoise(request: DenoiserRequest, run: _Run) -> tuple[Tensor, Tensor]:
    """Final latents, and what the model read at each step ``[S, ...]``; as diffusers' pipelines do."""
    scheduler = _scheduler(request)
    takes = inspect.signature(scheduler.step).parameters
    given: dict[str, Any] = {"eta": request.eta, "generator": request.new_generator()}
    options = {name: value for name, value in given.items() if name in takes}
    scale = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    latents = request.latents[None] * getattr(scheduler, "init_noise_sigma", 1.0)
    inputs = []
    for step, timestep in enumerate(scheduler.timesteps):
        inputs.append(scale(latents, timestep))
        output = run.call(step, timestep, inputs[-1])
        if request.branches == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + request.cfg_scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
    return latents[0], torch.cat(inputs)


def _scheduler(request: DenoiserRequest) -> Any:
    """A copy of the user's, set to the number of steps."""
    scheduler = copy.deepcopy(request.pipe.scheduler)
    settings = {} if request.flow is None else request.flow.settings(scheduler, request.num_inference_steps)
    scheduler.set_timesteps(request.num_inference_steps, device=request.latents.device, **settings)
    return scheduler
