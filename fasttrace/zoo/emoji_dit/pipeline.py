"""The pipeline: Stable Diffusion 3's, with one text tower where that has two and a T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from ...errors import ModelError

Embeddings = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class EmojiDiTPipeline(StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline``, but for ``encode_prompt``.

    The transformer reads the very states that ``emoji``'s UNet reads, the tower's last ones [B, 24, 128], and as the
    pooled state [B, 128] the end token's among them. Stable Diffusion 3 itself would read the last but one, of two
    towers side by side, and 256 more tokens that are zeros where there is no T5.
    """

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int = 256,
        lora_scale: float | None = None,
    ) -> Embeddings:
        """As the parent's; ``max_sequence_length`` is T5's, and so without effect.

        Returns:
            The text states [B, 24, 128] of the prompts, each ``num_images_per_prompt`` times, those of the negative
            prompts (the empty caption unless given; None without guidance), and the pooled states [B, 128] of both.
            States that are given are returned as they are.

        Raises:
            ModelError: an argument that only a second or third text encoder could use, or as many negative prompts
                as there are not prompts.
        """
        of_other_towers = {
            "prompt_2": prompt_2,
            "prompt_3": prompt_3,
            "negative_prompt_2": negative_prompt_2,
            "negative_prompt_3": negative_prompt_3,
            "clip_skip": clip_skip,
            "lora_scale": lora_scale,
        }
        if given := {name: value for name, value in of_other_towers.items() if value is not None}:
            raise ModelError(f"{given} given; emoji-dit has one text encoder, unscaled and whole: leave them out")
        if prompt_embeds is None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds, pooled_prompt_embeds = self._read(texts, device, num_images_per_prompt)
            number = len(texts)
        else:
            number = len(prompt_embeds)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            against = negative_prompt or ""
            negatives = [against] * number if isinstance(against, str) else list(against)
            if len(negatives) != number:
                raise ModelError(f"{len(negatives)} negative prompts for {number} prompts; give one, or one for each")
            negative_prompt_embeds, negative_pooled_prompt_embeds = self._read(negatives, device, num_images_per_prompt)
        assert pooled_prompt_embeds is not None  # the parent has checked that they come together
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    def _read(self, texts: Sequence[str], device: Any, times: int) -> tuple[Tensor, Tensor]:
        """Text states and pooled state of each text, ``times`` times in a row."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        output = self.text_encoder(ids.to(device or self._execution_device))
        states, pooled = output.last_hidden_state, output.pooler_output
        return states.repeat_interleave(times, dim=0), pooled.repeat_interleave(times, dim=0)
