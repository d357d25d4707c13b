"""One forward of each tiny transformer: as the model does it, and as its units do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrace.engine.denoise.execute import Joins, execute
from fasttrace.models import flux, pixart, sd3
from fasttrace.models.description import Description
from fasttrace.models.unet import text_keys
from fasttrace.models.unit import Dims, Forward

TOKENS, STEP, GUIDANCE = 7, 500.0, 3.5


@dataclass
class Call:
    """What a transformer is called with, in rows of its own text each; on ``meta`` without numbers."""

    model: Any
    rows: int
    size: tuple[int, int]
    device: str = "cpu"

    def __post_init__(self) -> None:
        config, dtype = self.model.config, self.model.dtype
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(self.rows, *shape, generator=generator).to(self.device, dtype)

        height, width = self.size
        self.kind = type(self.model).__name__
        packed = self.kind == "FluxTransformer2DModel"
        self.sample = draw(height * width, config.in_channels) if packed else draw(config.in_channels, height, width)
        self.embeds = draw(TOKENS, getattr(config, "joint_attention_dim", None) or config.caption_channels)
        self.pooled = draw(config.pooled_projection_dim) if "pooled_projection_dim" in config else None
        self.step = torch.tensor([STEP], device=self.device)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        self.ids = ids.to(self.device, dtype)
        kept = torch.arange(TOKENS) <= torch.arange(2, 2 + self.rows)[:, None]
        self.mask = kept.long().to(self.device)

    def by_model(self) -> Tensor:
        """The model's own forward."""
        step, model = self.step.expand(self.rows), self.model
        with torch.no_grad():
            if self.kind == "SD3Transformer2DModel":
                output = model(self.sample, self.embeds, self.pooled, step, return_dict=False)
            elif self.kind == "FluxTransformer2DModel":
                guidance = torch.full([self.rows], GUIDANCE, device=self.device)
                text_ids = torch.zeros(TOKENS, 3, device=self.device)
                given = (step.to(model.dtype) / 1000, self.ids, text_ids, guidance)
                output = model(self.sample, self.embeds, self.pooled, *given, return_dict=False)
            else:
                added = {"resolution": None, "aspect_ratio": None}
                output = model(
                    self.sample, self.embeds, step, added, encoder_attention_mask=self.mask, return_dict=False
                )
        result: Tensor = output[0]
        return result

    def forward(self, description: Description) -> Forward:
        """The constants that the units read."""
        model, shared = self.model, dict[str, Any]()
        if self.kind == "SD3Transformer2DModel":
            shared["texts"] = sd3.shared_texts(model, self.embeds)
            time = sd3.time_states(model, self.step, self.pooled)
        elif self.kind == "FluxTransformer2DModel":
            shared["texts"] = flux.shared_texts(model, self.embeds)
            shared["rotary"] = flux.rotary_tables(model, TOKENS, self.ids)
            time = flux.time_states(model, self.step, self.pooled, torch.tensor([GUIDANCE], device=self.device))
        else:
            texts = pixart.shared_texts(model, self.embeds)
            shared["keys"], shared["bias"] = text_keys(description, texts), pixart.padding_bias(self.mask, texts)
            time = pixart.time_states(model, self.step, 1, None, None)
        by_row = {"text": torch.arange(self.rows, device=self.device), "time": time}
        return Forward(Dims(*self.size, TOKENS), shared, by_row, self.rows)

    def by_units(self, description: Description, at_site: Any = lambda site, value: value) -> Tensor:
        """The units, one after another."""
        with torch.no_grad():
            forward, inputs = self.forward(description), {"sample": self.sample}
            (output,) = execute(description, forward, inputs, at_site, Joins(), {})
        return output
