"""SD3 and SD3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..pipeline import Conditions
from .denoiser import Denoiser, Flow, Size


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
