"""Injection: some cross-attentions read another text (LocoGen; Basu et al., arXiv 2405.01008).

A patch overwrites what a cross-attention puts out. Injection swaps what it takes in: keys and values of another text,
with the run's own queries, in the conditional branch. Runs go in lockstep batches, and one row alone gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.hooks import uncompiled
from ..engine.requests.denoise import UNetRequest
from ..pipeline import Condition
from ..sites import Site
from .axes import Steps
from .means import call_unet, trajectories

Injection = tuple[tuple[Site, ...], Steps]
"""The cross-attention sites of one run that read the other text, and at which steps; ``None`` for all."""


@torch.no_grad()
def trace_injected(
    request: UNetRequest,
    base: Condition,
    injected: Condition,
    runs: Sequence[Injection],
    max_batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Final latents ``[N, C, h, w]`` of runs in which some cross-attentions read another text.

    Args:
        request: for the latents, scheduler, guidance and negative condition; its runs are not read.
        base: what all other cross-attentions read.
        injected: what the sites of each run read; its pooled embedding is not used, SDXL keeps the base's.
        runs: one element a run.
        max_batch: most runs of one UNet call.
        progress: called after each UNet call with the number of rows it had.
    """
    base, injected = (one.to(request.latents.device, request.latents.dtype) for one in (base, injected))
    finals = [
        _batch(request, base, injected.embeds, runs[start : start + max_batch], progress)
        for start in range(0, len(runs), max_batch)
    ]
    return torch.cat(finals) if finals else request.latents.new_empty(0, *request.latents.shape)


def _batch(
    request: UNetRequest,
    base: Condition,
    embeds: Tensor,
    runs: Sequence[Injection],
    progress: Callable[[int], None] | None,
) -> Tensor:
    run = trajectories(request, len(runs))
    rows = len(runs) * request.branches
    sites = {site.name: site for members, _ in runs for site in members}
    for step in range(request.steps):
        with uncompiled(request.pipe.unet), ExitStack() as stack:
            for name, site in sites.items():
                takers = [
                    rows - len(runs) + index
                    for index, (members, steps) in enumerate(runs)
                    if any(member.name == name for member in members) and (steps is None or step in steps)
                ]
                if takers:
                    hook = _reader(torch.tensor(takers, device=embeds.device), embeds)
                    stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            output = call_unet(request, run.model_input(step), run.timesteps[step], base)
        run.advance(step, output)
        if progress is not None:
            progress(rows)
    return run.latents


def _reader(rows: Tensor, embeds: Tensor) -> Callable[..., Any]:
    def swap(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = kwargs["encoder_hidden_states"].clone()
        states[rows] = embeds
        return args, {**kwargs, "encoder_hidden_states": states}

    return swap
