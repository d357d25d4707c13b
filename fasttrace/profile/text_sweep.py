"""A sweep of the text encoder: what its plan saves, and how long it takes, from a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..engine.text import packed as packed_text
from ..engine.text.trace import TextRequest, run_text_request, text_request
from ..patch import Patch
from ..prompts import Prompt
from ..sites import part_sites
from .ceilings import seconds_of
from .flops import flop_counter

_SAMPLE = 64


@dataclass(frozen=True)
class TextSweep:
    """Every attention and MLP of the first text encoder restored at every token, for one prompt and noise sample.

    Attributes:
        runs: patched runs.
        common: 10^12 operations of a clean, a corrupted and a restored forward for each patch.
        shared: with clean and corrupted once.
        planned: of the packed pass, in which a run joins at its layer and token.
        seconds: of the packed pass, measured on ``sampled`` runs spread over all and scaled by operations.
        sampled: runs that were timed.
    """

    runs: int
    common: float
    shared: float
    planned: float
    seconds: float
    sampled: int


@torch.no_grad()
def text_sweep(pipe: Any) -> TextSweep:
    """Count the sweep, and time a part of it."""
    encoder = pipe.text_encoder
    prompt = Prompt("a photo of an apple", subject="apple").tokenize(pipe.tokenizer)
    width = encoder.get_input_embeddings().weight.shape[1]
    noise = torch.zeros(len(prompt.ids), width)
    noise[list(prompt.subject)] = torch.randn(len(prompt.subject), width, generator=torch.Generator().manual_seed(0))
    sites = [site for site in part_sites(encoder, "text_encoder") if site.kind != "hidden"]
    patches = [Patch(site.name, [token]) for site in sites for token in range(len(prompt.ids))]

    def request(some: list[Patch]) -> TextRequest:
        return text_request(encoder, list(prompt.ids), some, noise)

    def planned(one: TextRequest) -> float:
        return packed_text.plan_of(one).flops(encoder.config.hidden_size, encoder.config.intermediate_size)

    sample = request(patches[:: max(1, len(patches) // _SAMPLE)])
    whole, part = planned(request(patches)), planned(sample)
    seconds = seconds_of(lambda: run_text_request(sample), rounds=1)
    with flop_counter() as counter:
        encoder(input_ids=sample.ids[None])
    forward = counter.get_total_flops()
    return TextSweep(
        len(patches),
        3e-12 * len(patches) * forward,
        1e-12 * (len(patches) + 2) * forward,
        1e-12 * whole,
        seconds * whole / part,
        len(sample.runs),
    )
