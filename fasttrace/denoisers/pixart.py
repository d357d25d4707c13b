"""PixArt-alpha and -sigma: masked texts, the picture's size as an input of some, a variance beside the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pipeline import Conditions
from .denoiser import Denoiser, Size


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
