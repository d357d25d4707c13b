"""One planned call of the denoiser: unit by unit where its description covers it, else by forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.description import Description
from ...models.unit import Forward
from ..hooks import Hooked, value_hooks
from .architectures import Conditioned, Shared, architecture_of
from .execute import Trail, execute
from .patching import Cache, CallSites, patch_site
from .plan import CallPlan
from .site_map import SitePlan


@dataclass(frozen=True)
class CallInputs:
    """What a denoiser reads in one call.

    Attributes:
        sample: ``[R, ...]``, of the rows that are there from the start.
        timestep: ``[1]``, of all rows.
        text: ``[B]`` index into the conditions, of all rows.
    """

    sample: Tensor
    timestep: Tensor
    text: Tensor


@dataclass(frozen=True)
class Model:
    """A denoiser made ready for some requests.

    Attributes:
        given: its shadow, and what it is conditioned on.
        description: of the shadow.
        shared: constants of all rows; empty where the units do not run.
        observed: whether a hook of the user's may hold a value, so that it must not be overwritten in place.
    """

    given: Conditioned
    description: Description
    shared: Shared
    observed: bool


def call_model(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache, trail: Trail) -> Tensor:
    """What the scheduler is given of each row of a plan, before guidance, ``[B, ...]``."""
    if not model.description.runs:
        return _hooked(model, inputs, plan, cache)

    sites = CallSites(plan.sites, model.description.sites, cache, model.observed)
    by_row = {"time": time_of(model, inputs), "text": inputs.text}
    forward = Forward(model.given.dims, model.shared, by_row, inputs.sample.shape[0], sites.inside)
    (output,) = execute(model.description, forward, {"sample": inputs.sample}, sites.at_end, plan.joins, trail)
    return model.given.denoiser.prediction(output)


def time_of(model: Model, inputs: CallInputs) -> Tensor:
    """The time states of a call, ``[1 or B, E]``.

    Never part of a compiled graph, whose sines would differ from diffusers' in their last float32 bits.
    """
    return architecture_of(model.given.module).time(model.given, inputs.timestep, inputs.text)


def laid_out(sample: Tensor) -> Tensor:
    """Latents in the memory format of the shadow's convolutions; packed ones as they are."""
    return sample.contiguous(memory_format=torch.channels_last) if sample.ndim == 4 else sample.contiguous()


def _hooked(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache) -> Tensor:
    pairs: list[tuple[Hooked, Callable[[Tensor], Tensor]]] = []
    for name, site in plan.sites.items():

        def overwrite(value: Tensor, name: str = name, site: SitePlan = site) -> Tensor:
            return patch_site(value.clone(), name, site, cache)

        pairs.append((model.description.sites[name], overwrite))
    given = model.given
    with value_hooks(pairs):
        return given.denoiser.call(
            given.module, inputs.sample, inputs.timestep, given.texts[inputs.text], given.guidance, given.size
        )
