"""What the units of each architecture read beside values: constants made once for a trace, and once for a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ...denoisers import Denoiser, PixArt, image_ids
from ...models import flux, pixart, sd3, unet
from ...models.description import Description
from ...models.registry import description_of
from ...models.unet_ops import describe_unet_on_ops
from ...models.unit import Dims
from ...pipeline import Conditions

Shared: TypeAlias = dict[str, Any]
"""Constants of all rows by name: tensors, or tables of them."""


@dataclass(frozen=True)
class Conditioned:
    """A denoiser with all that it is conditioned on in a trace.

    Attributes:
        denoiser: the user's.
        module: its shadow.
        texts: conditions of all runs.
        guidance: the scale, for models that take it as an input.
        dims: of the latents and the text.
    """

    denoiser: Denoiser
    module: Any
    texts: Conditions
    guidance: Tensor | None
    dims: Dims

    @property
    def size(self) -> tuple[int, int]:
        return self.dims.height, self.dims.width


@dataclass(frozen=True)
class Architecture:
    """How a model's units are given what they read.

    Attributes:
        shared: constants of all rows, of which crossing attentions' keys and values are some.
        time: of the timestep ``[1]`` and each row's number among the conditions ``[B]``: ``[1 or B, D]``.
        on_ops: the description whose units run on ops, where there is one.
    """

    shared: Callable[[Conditioned, Description], Shared]
    time: Callable[[Conditioned, Tensor, Tensor], Tensor]
    on_ops: Callable[[Any], Description] | None = None

    def describe(self, model: Any, on_ops: bool) -> Description:
        """The units of a model."""
        if on_ops and self.on_ops is not None:
            return self.on_ops(model)
        description = description_of(model)
        assert description is not None, "only models that have a description have an adapter"
        return description


def architecture_of(model: Any) -> Architecture:
    """How the units of a model are given what they read."""
    return _ARCHITECTURES[type(model).__name__]


def _unet_shared(given: Conditioned, description: Description) -> Shared:
    embeds = given.texts.embeds
    return {"keys": unet.text_keys(description, embeds), "embeds": embeds}


def _unet_time(given: Conditioned, timestep: Tensor, text: Tensor) -> Tensor:
    texts, added = given.texts, None
    if texts.pooled is not None and texts.time_ids is not None:
        added = {"text_embeds": texts.pooled[text], "time_ids": texts.time_ids[text]}
    return unet.time_states(given.module, timestep, given.guidance, texts.embeds, added)


def _sd3_shared(given: Conditioned, description: Description) -> Shared:
    return {"texts": sd3.shared_texts(given.module, given.texts.embeds)}


def _sd3_time(given: Conditioned, timestep: Tensor, text: Tensor) -> Tensor:
    return sd3.time_states(given.module, timestep, _pooled(given, text))


def _flux_shared(given: Conditioned, description: Description) -> Shared:
    embeds = given.texts.embeds
    rotary = flux.rotary_tables(given.module, embeds.shape[1], image_ids(given.size, embeds))
    return {"texts": flux.shared_texts(given.module, embeds), "rotary": rotary}


def _flux_time(given: Conditioned, timestep: Tensor, text: Tensor) -> Tensor:
    return flux.time_states(given.module, timestep, _pooled(given, text), given.guidance)


def _pooled(given: Conditioned, text: Tensor) -> Tensor:
    assert given.texts.pooled is not None, "conditions are checked when they are given"
    return given.texts.pooled[text]


def _pixart_shared(given: Conditioned, description: Description) -> Shared:
    states, mask = pixart.shared_texts(given.module, given.texts.embeds), given.texts.mask
    return {
        "keys": unet.text_keys(description, states),
        "bias": None if mask is None else pixart.padding_bias(mask, states),
    }


def _pixart_time(given: Conditioned, timestep: Tensor, text: Tensor) -> Tensor:
    assert isinstance(given.denoiser, PixArt)
    return pixart.time_states(given.module, timestep, 1, **given.denoiser.picture(given.size, given.texts.embeds))


_ARCHITECTURES: Mapping[str, Architecture] = {
    "UNet2DConditionModel": Architecture(_unet_shared, _unet_time, describe_unet_on_ops),
    "SD3Transformer2DModel": Architecture(_sd3_shared, _sd3_time),
    "FluxTransformer2DModel": Architecture(_flux_shared, _flux_time),
    "PixArtTransformer2DModel": Architecture(_pixart_shared, _pixart_time),
}
