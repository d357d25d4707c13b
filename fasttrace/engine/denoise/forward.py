"""One planned UNet call: through flat units where the UNet has them, else by forward hooks on the shadow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...pipeline import Condition
from ..hooks import hooks
from ..values import first, with_first
from .patching import Cache, patch_site
from .plan import CallPlan, SitePlan
from .stream import AtSite, Joins, Stream, Trail
from .units import Unit


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
        units: from `flat_units`, or ``None``.
        texts: conditions of all requests.
        keys: from `text_keys`; empty without units.
        guidance: ``[1, E]`` embedding of the guidance scale, for models that take it (LCM).
        observed: whether a hook of the user's may hold a value, so that it must not be overwritten in place.
    """

    unet: Any
    units: list[Unit] | None
    texts: Texts
    keys: dict[str, tuple[Tensor, Tensor]]
    guidance: Tensor | None
    observed: bool


def call_unet(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache, trail: Trail) -> Tensor:
    """The UNet's output ``[B, C, h, w]`` for all rows of a plan."""
    if model.units is None:
        return _hooked(model, inputs, plan, cache)

    def at_site(site: str, value: Tensor) -> Tensor:
        here = plan.sites.get(site)
        if here is None:
            return value
        return patch_site(value.clone() if model.observed else value, site, here, cache)

    return flat_forward(model, inputs.sample, inputs.text, time_states(model, inputs), at_site, plan.joins, trail)


def time_states(model: Model, inputs: CallInputs) -> Tensor:
    """``[1 or B, E]``: timestep, guidance and added conditions as resnets read them.

    Never part of a compiled graph, whose sines would differ from diffusers' in their last float32 bits.
    """
    unet, one = model.unet, inputs.sample.new_empty(1)
    time: Tensor = unet.time_embedding(unet.get_time_embed(sample=one, timestep=inputs.timestep), model.guidance)
    extra = unet.get_aug_embed(
        emb=time, encoder_hidden_states=model.texts.embeds, added_cond_kwargs=model.texts.added(inputs.text)
    )
    if extra is not None:
        time = time + extra
    return time if unet.time_embed_act is None else unet.time_embed_act(time)


def flat_forward(
    model: Model, sample: Tensor, text: Tensor, time: Tensor, at_site: AtSite, joins: Joins, trail: Trail
) -> Tensor:
    """The units one after another; what diffusers' ``UNet2DConditionModel.forward`` does around its blocks.

    A call without rows at its beginning begins at the first site where some enter.
    """
    unet, units = model.unet, model.units or []
    multiple = 2**unet.num_upsamplers
    begins = not sample.shape[0]
    first = next(place for place, unit in enumerate(units) if unit.site in joins.entering) if begins else 0
    stream = Stream(
        x=sample if begins else unet.conv_in(sample),
        time=time,
        text=text,
        keys=model.keys,
        embeds=model.texts.embeds,
        at_site=at_site,
        resize=any(side % multiple for side in sample.shape[2:]),
        joins=joins,
        trail=trail,
        skips=[None] * sum(unit.keeps for unit in units[:first]),
    )
    for place, unit in enumerate(units[first:]):
        value = None if begins and not place else unit.run(stream)
        if unit.site:
            stream.arrive(unit.site, value, unit.adds)
    x = stream.x
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    output: Tensor = unet.conv_out(x)
    return output


def _hooked(model: Model, inputs: CallInputs, plan: CallPlan, cache: Cache) -> Tensor:
    pairs: list[tuple[nn.Module, Callable[..., Any]]] = []
    for name, site in plan.sites.items():

        def overwrite(module: nn.Module, args: Any, output: Any, name: str = name, site: SitePlan = site) -> Any:
            return with_first(output, patch_site(first(output).clone(), name, site, cache))

        pairs.append((model.unet.get_submodule(name.removeprefix("unet.")), overwrite))
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
