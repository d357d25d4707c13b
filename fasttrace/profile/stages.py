"""The stages of a pipeline around its UNet: what one prompt's text and one picture cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..pipeline import decode_latents, encode_prompt, latent_shape
from .ceilings import Ceilings, seconds_of
from .flops import flop_counter
from .peak import peak_of

_LONG = 1.0  # seconds of a call that is made once


@dataclass(frozen=True)
class StageCost:
    """One call of a stage.

    Attributes:
        stage: its name.
        seconds: measured.
        flops: counted.
        weights: bytes of its parameters.
        peak_bytes: most memory beside the weights; ``None`` where the system does not say.
        floor: seconds at the machine's ceilings: its operations, and its weights read once.
    """

    stage: str
    seconds: float
    flops: float
    weights: int
    peak_bytes: int | None
    floor: float


def stage_costs(pipe: Any, ceilings: Ceilings) -> list[StageCost]:
    """Encoding one prompt, with every text encoder of the pipeline, and decoding one picture."""
    latents = torch.randn(1, *latent_shape(pipe)).to(pipe.unet.device)
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    return [
        _cost("text, a prompt", lambda: encode_prompt(pipe, "a photo of an apple"), encoders, ceilings),
        _cost("VAE decoder, a picture", lambda: decode_latents(pipe, latents), [pipe.vae.decoder], ceilings),
    ]


def _cost(stage: str, run: Callable[[], object], modules: list[nn.Module | None], ceilings: Ceilings) -> StageCost:
    counter = flop_counter()

    def counted() -> None:
        with counter:
            run()

    started = time.perf_counter()
    peak = peak_of(counted)[1]
    seconds = time.perf_counter() - started
    if seconds < _LONG:
        seconds = seconds_of(run, rounds=3, warmup=0)
    weights = sum(p.nbytes for module in modules if module is not None for p in module.parameters())
    flops = float(counter.get_total_flops())
    return StageCost(stage, seconds, flops, weights, peak, ceilings.floor(flops, weights))
