"""A pipeline's denoiser as the pipeline itself calls it: what differs between architectures, an adapter each.

An adapter knows what its pipeline knows: how latents are drawn and laid out, what the model is called with, how its
schedule is set and its guidance formed. It calls the model that it is given, the user's own or one that shares its
weights, and knows of neither sites nor patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .encoding import encode
from .errors import ModelError, PatchError
from .pipeline import (
    Condition,
    Conditions,
    check_traceable,
    encode_negative,
    latent_shape,
    needs_added,
    refuse_offloaded,
    timestep_condition,
)

Size = tuple[int, int]
"""Height and width of the latents; of packed ones, in patches."""


@dataclass(frozen=True)
class Flow:
    """What a flow-matching schedule depends on beside the number of steps.

    Attributes:
        positions: of the image in the transformer; a dynamic shift grows with their number.
        even: whether the pipeline gives sigmas itself, evenly from 1 to 1 / steps before any shift (FLUX); else they
            are the scheduler's own (SD3).
    """

    positions: int
    even: bool

    def settings(self, scheduler: Any, num_inference_steps: int) -> dict[str, Any]:
        """Arguments of ``set_timesteps``, as the pipelines give them."""
        config, given = scheduler.config, dict[str, Any]()
        if self.even and not config.get("use_flow_sigmas", False):
            given["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if config.get("use_dynamic_shifting", False):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            slope = (high - low) / (many - few)
            given["mu"] = self.positions * slope + (low - slope * few)
        return given


@dataclass(frozen=True)
class Denoiser(ABC):
    """The denoiser of one pipeline.

    Attributes:
        pipe: the user's; of it only the model and the scheduler are needed where everything else is given.
        part: which attribute of the pipeline the model is.
        masked: whether conditions may have a mask.
    """

    pipe: Any
    part: ClassVar[str] = "transformer"
    masked: ClassVar[bool] = False

    @property
    def model(self) -> Any:
        """The user's own model."""
        return getattr(self.pipe, self.part)

    @property
    @abstractmethod
    def text_width(self) -> int:
        """``D`` of text states."""

    @property
    def pooled_width(self) -> int | None:
        """``P`` of pooled text, where the model reads it."""
        return None

    @property
    def needs_time_ids(self) -> bool:
        return False

    def check(self, what: str, condition: Condition) -> None:
        """Refuse a condition that has another form than the model reads.

        Raises:
            PatchError: a wrong shape.
            ModelError: a part that is missing, or that this model does not take.
        """
        embeds, name = condition.embeds, type(self.model).__name__
        if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != self.text_width:
            found = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise PatchError(f"{what}: embeds has shape {found}: expected [T, {self.text_width}]")
        expected = {
            "pooled": None if self.pooled_width is None else (self.pooled_width,),
            "time_ids": (6,) if self.needs_time_ids else None,
            "mask": (embeds.shape[0],) if self.masked else None,
        }
        for part, shape in expected.items():
            value = getattr(condition, part)
            if value is None and (shape is None or part == "mask"):
                continue
            if shape is None:
                raise ModelError(f"{what} has {part}, which {name} does not take: leave it out")
            if value is None:
                raise ModelError(f"{what} has no {part}: {name} needs Condition(..., {part}={list(shape)})")
            if tuple(value.shape) != shape:
                raise PatchError(f"{what}: {part} has shape {list(value.shape)}, expected {list(shape)}")

    @abstractmethod
    def drawn_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` in which the pipeline draws latents, at the model's own size."""

    def packed(self, drawn: Tensor) -> Tensor:
        """Latents ``[C, h, w]`` as the model reads them."""
        return drawn

    def size(self, latents: Tensor, given: Size | None) -> Size:
        """Height and width of latents as the model reads them, without the batch.

        Raises:
            PatchError: latents of another form.
        """
        channels = self.model.config.in_channels
        if latents.ndim != 3 or latents.shape[0] != channels:
            raise PatchError(f"latents has shape {list(latents.shape)}: expected [{channels}, h, w]")
        found = (latents.shape[1], latents.shape[2])
        if given not in (None, found):
            raise PatchError(f"size={given!r}: these latents are {found[0]} x {found[1]}, which needs no size")
        return found

    def flow(self, size: Size) -> Flow | None:
        """Of pipelines that sample by flow matching."""
        return None

    def negative(self, clean: Condition) -> Condition:
        """The pipeline's own condition of the unconditional branch, the empty prompt, beside a clean one."""
        if not hasattr(self.pipe, "encode_prompt"):
            raise ModelError("no negative condition and no text encoders to make one: give it, or guidance_scale=1")
        return encode(self.pipe, "").condition

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float:
        """By how much the conditional output is taken further from the unconditional one; 1 where there is none."""
        return max(1.0, guidance_scale)

    def guidance(self, guidance_scale: float) -> Tensor | None:
        """The scale where it is an input of the model, ``[1]`` or ``[1, E]``."""
        return None

    @abstractmethod
    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        """One call of the model, as the pipeline makes it.

        Args:
            model: whose; the user's own, or one that shares its weights.
            sample: latents ``[B, ...]``, scaled for the timestep.
            timestep: ``[]`` or ``[1]``, of the scheduler.
            texts: of each row.
            guidance: from `guidance`.
            size: from `size`.

        Returns:
            What the scheduler is given before guidance, ``[B, ...]`` in the shape of ``sample``.
        """

    def prediction(self, output: Tensor) -> Tensor:
        """What the scheduler is given, of all that the model puts out ``[B, ...]``."""
        return output


class UNet(Denoiser):
    """``UNet2DConditionModel``: Stable Diffusion 1.x and 2.x, SDXL."""

    part = "unet"

    @property
    def text_width(self) -> int:
        return int(self.model.config.cross_attention_dim)

    @property
    def pooled_width(self) -> int | None:
        config = self.model.config
        if not needs_added(self.pipe):
            return None
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    @property
    def needs_time_ids(self) -> bool:
        return needs_added(self.pipe)

    def drawn_shape(self) -> tuple[int, int, int]:
        return latent_shape(self.pipe)

    def negative(self, clean: Condition) -> Condition:
        return replace(encode_negative(self.pipe), time_ids=clean.time_ids)

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float:
        return 1.0 if self.model.config.time_cond_proj_dim is not None else max(1.0, guidance_scale)

    def guidance(self, guidance_scale: float) -> Tensor | None:
        return timestep_condition(self.pipe, guidance_scale)

    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        output: Tensor = model(
            sample,
            timestep.expand(len(sample)),
            encoder_hidden_states=texts.embeds,
            timestep_cond=guidance,
            added_cond_kwargs=texts.added(),
            return_dict=False,
        )[0]
        return output


class SD3(Denoiser):
    """``SD3Transformer2DModel``: SD3 and SD3.5."""

    @property
    def text_width(self) -> int:
        return int(self.model.config.joint_attention_dim)

    @property
    def pooled_width(self) -> int | None:
        return int(self.model.config.pooled_projection_dim)

    def drawn_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    def flow(self, size: Size) -> Flow | None:
        patch = self.model.config.patch_size
        return Flow((size[0] // patch) * (size[1] // patch), even=False)

    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        output: Tensor = model(
            hidden_states=sample,
            timestep=timestep.expand(len(sample)),
            encoder_hidden_states=texts.embeds,
            pooled_projections=texts.pooled,
            return_dict=False,
        )[0]
        return output


class Flux(Denoiser):
    """``FluxTransformer2DModel``: FLUX.1. Latents are packed, two by two, into ``[P, C]``."""

    @property
    def text_width(self) -> int:
        return int(self.model.config.joint_attention_dim)

    @property
    def pooled_width(self) -> int | None:
        return int(self.model.config.pooled_projection_dim)

    def drawn_shape(self) -> tuple[int, int, int]:
        side = 2 * (getattr(self.pipe, "default_sample_size", 128) // 2)
        return self.model.config.in_channels // 4, side, side

    def packed(self, drawn: Tensor) -> Tensor:
        channels, height, width = drawn.shape
        cut = drawn.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
        return cut.reshape(height // 2 * (width // 2), channels * 4)

    def size(self, latents: Tensor, given: Size | None) -> Size:
        channels = self.model.config.in_channels
        if latents.ndim != 2 or latents.shape[1] != channels:
            raise PatchError(f"latents has shape {list(latents.shape)}: expected packed ones, [P, {channels}]")
        side = math.isqrt(len(latents))
        found = given or (side, side)
        if found[0] * found[1] != len(latents):
            raise PatchError(
                f"size={given!r}: {len(latents)} packed latents are no square of patches; give size=(rows, columns), "
                f"of which the product is {len(latents)}"
            )
        return found

    def flow(self, size: Size) -> Flow | None:
        return Flow(size[0] * size[1], even=True)

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float:
        return max(1.0, true_cfg_scale) if has_negative else 1.0

    def guidance(self, guidance_scale: float) -> Tensor | None:
        if not self.model.config.guidance_embeds:
            return None
        return torch.full([1], guidance_scale, dtype=torch.float32, device=self.model.device)

    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        rows, like = len(sample), texts.embeds
        output: Tensor = model(
            hidden_states=sample,
            timestep=timestep.expand(rows).to(sample.dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(rows),
            pooled_projections=texts.pooled,
            encoder_hidden_states=texts.embeds,
            txt_ids=like.new_zeros(like.shape[1], 3),
            img_ids=image_ids(size, like),
            return_dict=False,
        )[0]
        return output


def image_ids(size: Size, like: Tensor) -> Tensor:
    """FLUX's places of an image's patches, ``[P, 3]``: row and column are the second and third number."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(like)


class PixArt(Denoiser):
    """``PixArtTransformer2DModel``: PixArt-alpha and -sigma. The model's further channels are a variance."""

    masked = True

    @property
    def text_width(self) -> int:
        return int(self.model.config.caption_channels)

    def drawn_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    def picture(self, size: Size, like: Tensor) -> dict[str, Tensor | None]:
        """Height and width of the picture ``[1, 2]`` and their ratio ``[1, 1]``, for models that take them."""
        if not self.model.config.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        scale = getattr(self.pipe, "vae_scale_factor", 8)
        resolution = torch.tensor([[side * scale for side in size]])
        ratio = torch.tensor([[size[0] / size[1]]])
        return {"resolution": resolution.to(like), "aspect_ratio": ratio.to(like)}

    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        picture = self.picture(size, texts.embeds)
        added = {name: None if one is None else one.expand(len(sample), -1) for name, one in picture.items()}
        output: Tensor = model(
            sample,
            encoder_hidden_states=texts.embeds,
            encoder_attention_mask=texts.mask,
            timestep=timestep.expand(len(sample)),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return self.prediction(output)

    def prediction(self, output: Tensor) -> Tensor:
        channels = self.model.config.in_channels
        return output[:, :channels] if self.model.config.out_channels // 2 == channels else output


DENOISERS: dict[str, type[Denoiser]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
}


def denoiser_of(pipe: Any) -> Denoiser:
    """The adapter of a pipeline's denoiser.

    Raises:
        ModelError: a denoiser of another class, or one that is offloaded.
    """
    model = getattr(pipe, "transformer", None)
    if model is None:
        check_traceable(pipe)
        return UNet(pipe)
    name = type(model).__name__
    if name not in DENOISERS:
        raise ModelError(f"{type(pipe).__name__} has a {name}: expected one of {', '.join(DENOISERS)}")
    refuse_offloaded(pipe)
    return DENOISERS[name](pipe)
