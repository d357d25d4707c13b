"""One planned call of the denoiser: unit by unit where its description covers it, else by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.description import Description
from ...models.unet import time_states
from ...models.unit import Dims, Forward
from ...pipeline import Condition
from ..hooks import hooks
from ..values import first, with_first
from .execute import Trail, execute
from .patching import Cache, CallSites, patch_site
from .plan import CallPlan
from .site_map import SitePlan


@dataclass(frozen=True)
class Texts:
    """Conditions of all runs of a trace, one a row: ``embeds [K, T, D]``, ``pooled [K, E]``, ``time_ids [K, 6]``."""

    embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None

    @staticmethod
    def of(conditions: Sequence[Condition], dtype: torch.dtype) -> Texts:
        pooled = [condition.pooled for condition in conditions if condition.pooled is not None]
        time_ids = [condition.time_ids for condition in conditions if condition.time_ids is not None]
        return Texts(
            torch.stack([condition.embeds for condition in conditions]).to(dtype),
            torch.stack(pooled).to(dtype) if pooled else None,
            torch.stack(time_ids).to(dtype) if time_ids else None,
        )

    def added(self, text: Tensor) -> dict[str, Tensor] | None:
        """SDXL's added conditions of some rows."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled[text], "time_ids": self.time_ids[text]}


@dataclass(frozen=True)
class CallInputs:
    """What a UNet reads in one call.

    Attributes:
        sample: ``[R, C, h, w]``, of the rows that are there from the start.
        timestep: ``[1]``, of all rows.
        text: ``[B]`` index into the conditions, of all rows.
    """

    sample: Tensor
    timestep: Tensor
    text: Tensor


@dataclass(frozen=True)
class Model:
    """A UNet made ready for some requests.

    Attributes:
        unet: the shadow.
        description: of the shadow.
        texts: conditions of all requests.
        keys: from `fasttrace.models.unet.text_keys`; empty where the units do not run.
        guidance: ``[1, E]`` embedding of the guidance scale, for models that take it (LCM).
        observed: whether a hook of the user's may hold a value, so that it must not be overwritten in place.
    """

    unet: Any
    description: Description
    texts: Texts
    keys: dict[str, tuple[Tensor, Tensor]]
    guidance: Tensor | None
    observed: bool


def call_unet(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache, trail: Trail) -> Tensor:
    """The UNet's output ``[B, C, h, w]`` for all rows of a plan."""
    if not model.description.runs:
        return _hooked(model, inputs, plan, cache)

    sites = CallSites(plan.sites, cache, model.observed)
    forward = unet_forward(model, inputs.sample, inputs.text, time_of(model, inputs), sites)
    (output,) = execute(model.description, forward, {"sample": inputs.sample}, sites.at_end, plan.joins, trail)
    return output


def time_of(model: Model, inputs: CallInputs) -> Tensor:
    """The time states of a call, ``[1 or B, E]``."""
    texts = model.texts
    return time_states(model.unet, inputs.timestep, model.guidance, texts.embeds, texts.added(inputs.text))


def unet_forward(model: Model, sample: Tensor, text: Tensor, time: Tensor, sites: CallSites | None = None) -> Forward:
    """The constants of one call, of which ``sample`` holds the rows that are there from the start."""
    dims = Dims(sample.shape[2], sample.shape[3], model.texts.embeds.shape[1])
    shared = {"keys": model.keys, "embeds": model.texts.embeds}
    return Forward(dims, shared, {"time": time, "text": text}, sample.shape[0], None if sites is None else sites.inside)


def _hooked(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache) -> Tensor:
    pairs: list[tuple[nn.Module, Callable[..., Any]]] = []
    for name, site in plan.sites.items():

        def overwrite(module: nn.Module, args: Any, output: Any, name: str = name, site: SitePlan = site) -> Any:
            return with_first(output, patch_site(first(output).clone(), name, site, cache))

        pairs.append((model.description.sites[name].module, overwrite))
    with hooks(pairs):
        output: Tensor = model.unet(
            inputs.sample,
            inputs.timestep.expand(inputs.sample.shape[0]),
            encoder_hidden_states=model.texts.embeds[inputs.text],
            timestep_cond=model.guidance,
            added_cond_kwargs=model.texts.added(inputs.text),
            return_dict=False,
        )[0]
    return output
