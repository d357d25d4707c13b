"""Pictures of captions in bulk: what evaluation draws and how."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import FULL_TEMPLATES, Caption, Scene, caption


@dataclass(frozen=True)
class Settings:
    """How pictures are made; seeds are the pictures' numbers."""

    steps: int = 20
    guidance: float = 3.0
    batch: int = 50


def choose(scenes: Sequence[Scene], number: int, seed: int = 0) -> list[tuple[Scene, Caption]]:
    """Random scenes without repetition, each with a caption in one of the templates that name every attribute."""
    rng = random.Random(seed)
    return [(scene, caption(scene, rng.randrange(FULL_TEMPLATES))) for scene in rng.sample(list(scenes), number)]


@torch.no_grad()
def text_states(pipe: Any, texts: Sequence[str]) -> Tensor:
    """[B, 24, 128]."""
    ids = pipe.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    states: Tensor = pipe.text_encoder(ids.to(pipe.device))[0]
    return states


@torch.no_grad()
def generate(pipe: Any, states: Tensor, seeds: Sequence[int], settings: Settings) -> Tensor:
    """Pictures [B, 3, 64, 64] in [0, 1] of text states [B, 24, 128]."""
    empty = text_states(pipe, [""])
    parts = []
    for start in tqdm(range(0, len(states), settings.batch), desc="pictures", leave=False):
        part = states[start : start + settings.batch]
        parts.append(
            pipe(
                prompt_embeds=part,
                negative_prompt_embeds=empty.expand(len(part), -1, -1),
                generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + settings.batch]],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(parts)


def labels_of(scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([scene.labels for scene in scenes])
