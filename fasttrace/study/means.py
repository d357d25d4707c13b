"""Mean values of sites over the clean runs of a study's prompts, for mean ablation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.denoise.trajectory import Trajectories
from ..engine.hooks import uncompiled, value_hooks
from ..engine.requests.denoise import UNetRequest
from ..engine.values import to_positions
from ..pipeline import Condition, encode_prompt, timestep_condition
from ..sites import Site
from .conditions import attention_mask
from .settings import Settings


def text_means(study: Settings, sites: list[Site]) -> dict[str, Tensor]:
    """Mean over prompts of each text site's clean value at each position, ``[T, D]`` by site name."""
    sums: dict[str, Tensor] = {}
    pairs: list[tuple[Site, Callable[[Tensor], None]]] = []
    for site in sites:

        def add(value: Tensor, name: str = site.name) -> None:
            sums[name] = sums.get(name, 0) + value[0].double()

        pairs.append((site, add))
    with torch.no_grad(), value_hooks(pairs):
        for part in dict.fromkeys(site.part for site in sites):
            encoder = getattr(study.pipe, part)
            for prompt in sorted(study.prompts, key=lambda prompt: prompt.id):
                tokens = study.tokens[part][prompt.id]
                mask = attention_mask(encoder, tokens)
                with uncompiled(encoder):
                    encoder(
                        input_ids=torch.tensor([tokens.ids], device=encoder.device),
                        attention_mask=None if mask is None else torch.tensor([mask], device=encoder.device),
                    )
    return {name: (total / len(study.prompts)).to(study.pipe.unet.dtype) for name, total in sums.items()}


def unet_means(
    study: Settings, sites: list[Site], request_of: Callable[[Condition, int], UNetRequest]
) -> dict[str, Tensor]:
    """Mean over prompts, seeds and pixels of each UNet site's clean value, ``[S, C]`` by site name.

    Args:
        study: the study.
        sites: UNet sites.
        request_of: a request for a text condition and a seed, which gives latents, guidance and scheduler.
    """
    sums: dict[str, Tensor] = {}
    now = 0
    pairs: list[tuple[Site, Callable[[Tensor], None]]] = []
    for site in sites:

        def add(value: Tensor, name: str = site.name) -> None:
            mean = to_positions(value[-1:])[0].double().mean(0)
            if name not in sums:
                sums[name] = mean.new_zeros(study.step_count, mean.shape[0])
            sums[name][now] += mean

        pairs.append((site, add))
    count = 0
    with torch.no_grad(), uncompiled(study.pipe.unet), value_hooks(pairs):
        for prompt in sorted(study.prompts, key=lambda prompt: prompt.id):
            condition = encode_prompt(study.pipe, prompt.text)
            for seed in sorted(study.seeds_of(prompt)):
                count += 1
                request = request_of(condition, seed)
                run = trajectories(request, 1)
                for now in range(request.steps):
                    output = call_unet(request, run.model_input(now), run.timesteps[now], request.conditions["clean"])
                    run.advance(now, output)
    return {name: (total / count).to(study.pipe.unet.dtype) for name, total in sums.items()}


def trajectories(request: UNetRequest, rows: int) -> Trajectories:
    """Rows that all start where a request's runs start."""
    return Trajectories(
        request.pipe.scheduler, request.num_inference_steps, request.latents, request.new_generator(), rows, request.eta
    )


def call_unet(request: UNetRequest, scaled: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """The guided model output ``[rows, C, h, w]`` of rows with one condition; unconditional rows come first."""
    rows = scaled.shape[0]
    branches = [condition] if request.negative is None else [request.negative, condition]
    added = None
    if condition.pooled is not None:
        added = {
            "text_embeds": torch.cat([one.pooled.expand(rows, -1) for one in branches if one.pooled is not None]),
            "time_ids": torch.cat([one.time_ids.expand(rows, -1) for one in branches if one.time_ids is not None]),
        }
    output: Tensor = request.pipe.unet(
        scaled.repeat(len(branches), 1, 1, 1),
        timestep,
        encoder_hidden_states=torch.cat([one.embeds.expand(rows, -1, -1) for one in branches]),
        timestep_cond=timestep_condition(request.pipe, request.guidance_scale),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    if len(branches) == 1:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + request.guidance_scale * (conditional - unconditional)
