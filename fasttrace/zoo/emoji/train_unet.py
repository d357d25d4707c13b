"""Stage ``unet``: the denoiser, by v-prediction on cached latents and text states of the training scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import architecture
from .data import TEMPLATES, caption, fits, layouts, render_all, training_scenes
from .muon import Muon
from .train_scorer import encode
from .training import Loop

NO_CAPTION = 0.1  # share of samples with the empty caption, for classifier-free guidance


@dataclass(frozen=True)
class Cache:
    """Everything the denoiser learns from, encoded once.

    latents [L, 16, 8, 8] and texts [C, 24, 128], scaled as the pipeline has them; of scene ``i``,
    ``pictures[i]`` and ``captions[i]`` list the rows; ``empty`` [24, 128] is the empty caption's states.
    """

    latents: Tensor
    texts: Tensor
    empty: Tensor
    pictures: list[range]
    captions: list[range]


def training_captions() -> list[str]:
    """Every caption of every training scene, in the order of the cache's rows."""
    return [caption(s, t).text for s in training_scenes() for t in range(len(TEMPLATES)) if fits(s, t)]


@torch.no_grad()
def build_cache(vae: Any, text_encoder: Any, tokenizer: Any) -> Cache:
    """Encode every training picture, and every caption of it."""
    scenes = training_scenes()
    laid = [(scene, layout) for scene in scenes for layout in range(layouts(scene))]
    said = training_captions()
    latents = []
    for start in range(0, len(laid), 64):
        part = laid[start : start + 64]
        images = torch.from_numpy(render_all([s for s, _ in part], [k for _, k in part])).permute(0, 3, 1, 2)
        latents.append(vae.encode(images.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor)
    texts = [text_encoder(encode(tokenizer, said[i : i + 256]))[0].half() for i in range(0, len(said), 256)]
    empty = text_encoder(encode(tokenizer, [""]))[0][0]
    pictures = _ranges([layouts(scene) for scene in scenes])
    captions = _ranges([sum(fits(scene, t) for t in range(len(TEMPLATES))) for scene in scenes])
    return Cache(torch.cat(latents), torch.cat(texts), empty, pictures, captions)


def _ranges(lengths: list[int]) -> list[range]:
    out, start = [], 0
    for length in lengths:
        out.append(range(start, start + length))
        start += length
    return out


def draw(cache: Cache, batch: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Latents [B, 16, 8, 8] and text states [B, 24, 128] of random scenes."""
    scenes = rng.choices(range(len(cache.pictures)), k=batch)
    latents = cache.latents[[rng.choice(cache.pictures[i]) for i in scenes]]
    texts = cache.texts[[rng.choice(cache.captions[i]) for i in scenes]].float()
    texts[[rng.random() < NO_CAPTION for _ in scenes]] = cache.empty
    return latents, texts


def train(
    cache: Cache,
    work: Path,
    minutes: float,
    *,
    start: Any = None,
    resume: bool = False,
    batch: int = 96,
    lr: float = 1e-3,
    compiled: bool = False,
    max_steps: int | None = None,
) -> Any:
    """Train from ``start`` (or from nothing) and return the ``UNet2DConditionModel``, its moving average.

    ``compiled`` runs it through ``torch.compile``: a C++ compiler and a minute, and then a fifth off every step.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    torch.manual_seed(0)
    model = (start or architecture.unet()).train().to(memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor())  # its backward pass is several times as fast on a CPU
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = Muon(model.parameters(), lr=lr)
    loop = Loop("unet", model, optimizer, work, minutes, resume=resume, decay=0.998, max_steps=max_steps)
    rng = random.Random(loop.step)
    torch.manual_seed(loop.step)
    signal = architecture.scheduler().alphas_cumprod
    for _ in loop:
        latents, texts = draw(cache, batch, rng)
        # Stratified: one time from each equal part of the schedule, so that batches do not differ in difficulty.
        times = ((torch.arange(batch) + torch.rand(batch)) / batch * len(signal)).long()
        noise = torch.randn_like(latents)
        a = signal[times, None, None, None].sqrt()
        s = (1 - signal[times, None, None, None]).sqrt()
        noisy = (a * latents + s * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(noisy, times, texts).sample
        loop.backward(F.mse_loss(output.float(), a * noise - s * latents))
    loop.load_average()
    model.set_attn_processor(AttnProcessor2_0())
    return model.eval().requires_grad_(False)
