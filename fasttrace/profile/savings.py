"""What each of the engine's ideas saves on a model: UNet forwards of one row, counted from plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.denoise.cost import cost_of
from ..engine.denoise.trace import plan_summary
from ..engine.requests.denoise import UNetRequest, unet_request
from ..models.unet import describe_unet
from ..models.unit import Dims, weights_in
from ..patch import Patch
from ..pipeline import encode_prompt, latent_shape, needs_added
from ..sites import Site


@dataclass(frozen=True)
class Saving:
    """One way to sweep every site, and the forwards it takes for one prompt and seed.

    Attributes:
        sweep: what is swept.
        runs: patched runs.
        common: forwards with clean, corrupted and restored run for each patch: the common practice.
        shared: forwards with the clean and the corrupted run made once.
        planned: forwards that the plan needs; a row that joins at its site counts as a fraction.
        tflop: of ``planned``.
        memory_bytes: expected peak beside the weights.
    """

    sweep: str
    runs: int
    common: int
    shared: int
    planned: float
    tflop: float
    memory_bytes: int


def savings(pipe: Any, sites: Sequence[Site], steps: int, guidance_scale: float = 7.5) -> list[Saving]:
    """Count a sweep of every site: free, teacher-forced, and as a grid of sites and steps."""
    names = [site.name for site in sites]
    everywhere = [Patch(name) for name in names]
    grid = [Patch(name, steps=[step]) for name in names for step in range(steps)]
    asked = [("free, all steps", everywhere, "free"), ("teacher-forced, all steps", everywhere, "teacher_forced")]
    asked.append(("free, site x step grid", grid, "free"))
    found = []
    for sweep, patches, protocol in asked:
        summary = plan_summary([sweep_request(pipe, patches, steps, guidance_scale, protocol)])
        found.append(
            Saving(
                sweep,
                len(patches),
                summary.naive_three,
                summary.naive_shared,
                summary.forwards,
                summary.tflop,
                summary.memory_bytes,
            )
        )
    return found


def text_share(pipe: Any) -> float:
    """Operations of the text's keys and values, as a share of a UNet call's: what is computed once, not every step."""
    tokens, (_, height, width) = pipe.tokenizer.model_max_length, latent_shape(pipe)
    model = describe_unet(pipe.unet)
    weights = sum(weights_in(attention.to_k, attention.to_v) for attention in model.crossing.values())
    keys = 2.0 * tokens * weights
    return keys / (keys + cost_of(model, Dims(height, width, tokens)).flops)


def sweep_request(
    pipe: Any,
    patches: Sequence[Patch],
    steps: int,
    guidance_scale: float,
    protocol: str,
    base: Any = "corrupted",
    **more: Any,
) -> UNetRequest:
    """A checked request between two prompts, for counting and timing."""
    clean, corrupted = (encode_prompt(pipe, text) for text in ("a photo of an apple", "a photo of a dog"))
    added = (clean.pooled, clean.time_ids) if needs_added(pipe) else None
    options: dict[str, Any] = {
        "latents": None,
        "seed": 0,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_embeds": None,
        "clean_added": added,
        "corrupted_added": None,
        "negative_added": None,
        "sources": None,
        "base": base,
        "protocol": protocol,
        "eta": 0.0,
        "max_batch": None,
    }
    with torch.no_grad():
        return unet_request(pipe, clean.embeds, corrupted.embeds, patches, **(options | more))
