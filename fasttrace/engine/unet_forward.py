"""One planned UNet call by forward hooks on the shadow: for any UNet, with every row there from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline import Condition
from .oracle import hooks
from .unet_patch import Cache, patch_site
from .unet_plan import CallPlan, SitePlan
from .values import first, with_first


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


@dataclass(frozen=True)
class CallInputs:
    """What a UNet reads in one call.

    Attributes:
        sample: ``[R, C, h, w]``, of the rows that are there from the start.
        timesteps: ``[R]``.
        text: ``[B]`` index into ``texts``, of all rows.
        texts: the conditions.
        guidance: ``[1, E]`` embedding of the guidance scale, for models that take it (LCM).
    """

    sample: Tensor
    timesteps: Tensor
    text: Tensor
    texts: Texts
    guidance: Tensor | None


def hooked_forward(unet: nn.Module, inputs: CallInputs, plan: CallPlan, cache: Cache) -> Tensor:
    """The UNet's output ``[B, C, h, w]`` for a plan in which no row joins."""
    pairs: list[tuple[nn.Module, Callable[..., Any]]] = []
    for name, site in plan.sites.items():

        def overwrite(module: nn.Module, args: Any, output: Any, name: str = name, site: SitePlan = site) -> Any:
            return with_first(output, patch_site(first(output).clone(), name, site, cache))

        pairs.append((unet.get_submodule(name.removeprefix("unet.")), overwrite))
    texts, text = inputs.texts, inputs.text
    added = None
    if texts.pooled is not None and texts.time_ids is not None:
        added = {"text_embeds": texts.pooled[text], "time_ids": texts.time_ids[text]}
    with hooks(pairs):
        output: Tensor = unet(
            inputs.sample,
            inputs.timesteps,
            encoder_hidden_states=texts.embeds[text],
            timestep_cond=inputs.guidance,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return output
