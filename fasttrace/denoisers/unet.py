"""Stable Diffusion 1.x and 2.x, SDXL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..pipeline import Condition, Conditions, encode_negative, latent_shape, needs_added, timestep_condition
from .denoiser import Denoiser, Size


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
