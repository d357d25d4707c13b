"""FLUX.1: packed latents, ids of their places, the guidance scale as an input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchError
from ..pipeline import Conditions
from .denoiser import Denoiser, Flow, Size


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
