"""The transformer's training: flow matching on ``emoji``'s cached latents and text states, of training scenes alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..emoji.muon import Muon
from ..emoji.train_unet import NO_CAPTION, Cache, build_cache, training_captions
from ..emoji.training import Loop
from . import architecture


@dataclass(frozen=True)
class Material:
    """What the transformer learns from: ``emoji``'s cache, and where each of its captions ends.

    ``ends`` [C] are the positions of the end token, whose state is the pooled one in CLIP; ``empty_end`` is that of the
    empty caption.
    """

    cache: Cache
    ends: Tensor
    empty_end: int


def build_material(vae: Any, text_encoder: Any, tokenizer: Any) -> Material:
    """Encode every training picture, and every caption of it."""

    def ends(texts: list[str]) -> list[int]:
        return [len(ids) - 1 for ids in tokenizer(texts, truncation=True)["input_ids"]]

    cache = build_cache(vae, text_encoder, tokenizer)
    return Material(cache, torch.tensor(ends(training_captions())), ends([""])[0])


def draw(material: Material, batch: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 16, 8, 8], text states [B, 24, 128] and pooled text states [B, 128] of random scenes."""
    cache = material.cache
    scenes = rng.choices(range(len(cache.pictures)), k=batch)
    latents = cache.latents[[rng.choice(cache.pictures[i]) for i in scenes]]
    captions = [rng.choice(cache.captions[i]) for i in scenes]
    texts, ends = cache.texts[captions].float(), material.ends[captions]
    silent = [rng.random() < NO_CAPTION for _ in scenes]
    texts[silent], ends[silent] = cache.empty, material.empty_end
    return latents, texts, texts[torch.arange(batch), ends]


def noise_levels(batch: int, shift: float) -> Tensor:
    """[B] in (0, 1), shifted as the scheduler shifts its own: 0 is the picture and 1 is noise.

    Stratified: one from each equal part of the schedule, so that batches do not differ in difficulty.
    """
    even = (torch.arange(batch) + torch.rand(batch)) / batch
    return shift * even / (1 + (shift - 1) * even)


def train(
    material: Material,
    work: Path,
    minutes: float,
    *,
    start: Any = None,
    resume: bool = False,
    batch: int = 64,
    lr: float = 3e-3,
    compiled: bool = False,
    max_steps: int | None = None,
) -> Any:
    """Train from ``start`` (or from nothing) and return the ``SD3Transformer2DModel``, its moving average.

    ``compiled`` runs it through ``torch.compile``: a C++ compiler and two minutes, and then a tenth off every step.
    """
    torch.manual_seed(0)
    model = (start or architecture.transformer()).train()
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = Muon(model.parameters(), lr=lr, precision=torch.float32)
    loop = Loop("transformer", model, optimizer, work, minutes, resume=resume, decay=0.998, max_steps=max_steps)
    rng = random.Random(loop.step)
    torch.manual_seed(loop.step)
    scheduler = architecture.scheduler().config
    for _ in loop:
        latents, texts, pooled = draw(material, batch, rng)
        levels = noise_levels(batch, scheduler.shift)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, levels[:, None, None, None])
        output = forward(
            hidden_states=noisy,
            encoder_hidden_states=texts,
            pooled_projections=pooled,
            timestep=levels * scheduler.num_train_timesteps,
            return_dict=False,
        )[0]
        loop.backward(F.mse_loss(output, noise - latents))
    loop.load_average()
    return model.eval().requires_grad_(False)
