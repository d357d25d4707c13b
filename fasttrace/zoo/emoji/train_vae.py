"""Stage ``vae``: the autoencoder, on training pictures only; then its latents are centred and scaled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import architecture
from .data import layouts, render_all, training_scenes
from .muon import Muon
from .training import Loop


def pictures(scenes: list[Any], rng: random.Random) -> Tensor:
    """[B, 3, 64, 64] in [-1, 1], channels-last."""
    images = torch.from_numpy(render_all(scenes, [rng.randrange(layouts(scene)) for scene in scenes]))
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error, plus that of the differences between neighbours, which keeps outlines sharp."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for axis in (2, 3):
        loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def train(
    work: Path,
    minutes: float,
    *,
    start: Any = None,
    decoder_only: bool = False,
    resume: bool = False,
    batch: int = 16,
    max_steps: int | None = None,
) -> Any:
    """Train from ``start`` (or from nothing) and return the autoencoder, its latents centred with unit variance.

    With ``decoder_only`` the latents stay as they are, for a denoiser that has learnt them.
    """
    torch.manual_seed(0)
    model = (start or architecture.vae()).train().requires_grad_(True).to(memory_format=torch.channels_last)
    if decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    optimizer = Muon((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    loop = Loop("vae", model, optimizer, work, minutes, resume=resume, decay=0.995, max_steps=max_steps)
    rng = random.Random(loop.step)
    scenes = training_scenes()
    scale = model.config.scaling_factor if decoder_only else 1.0
    for _ in loop:
        images = pictures(rng.choices(scenes, k=batch), rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            # Noise of a tenth of the latents' spread: the decoder must forgive what a denoiser leaves behind.
            mean = posterior.mean
            latents = mean + torch.randn_like(mean) * 0.1 / scale
            output = model.decode(latents).sample
        spread = posterior.mean.float()
        prior = 1e-3 * (spread.square().mean() + (spread.var(dim=(0, 2, 3)) - 1).square().mean())
        loop.backward(reconstruction_loss(output.float(), images) + prior)
    loop.load_average()
    model.eval().requires_grad_(False)
    if not decoder_only:
        centre(model, pictures(random.Random(0).sample(scenes, min(1000, len(scenes))), rng))
    return model


@torch.no_grad()
def centre(model: Any, images: Tensor) -> None:
    """Move each latent channel's mean to zero inside the 1x1 convolutions, and set the scale that makes variance one.

    The posterior's own spread, which training does not use, is set to next to nothing: encoding is deterministic.
    """
    latents = torch.cat([model.encode(part).latent_dist.mean for part in torch.split(images, 50)])
    mean = latents.mean(dim=(0, 2, 3))
    model.quant_conv.bias[: len(mean)] -= mean
    model.quant_conv.weight[len(mean) :] = 0
    model.quant_conv.bias[len(mean) :] = -20
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    model.register_to_config(scaling_factor=float(1 / (latents - mean[:, None, None]).std()))
