"""The calls behind the scaling curves: what is run at each size, and the operations that its plan counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

import fasttrace as ft
from fasttrace.engine.denoise.trace import plan_summary, run_request, unet_request
from fasttrace.engine.text import packed as packed_text
from fasttrace.engine.text.trace import run_text_request, text_request
from fasttrace.patch import PatchSet

Run = tuple[Callable[[], object], float]
"""A call, and the floating-point operations of its plan, in units of 10^9."""


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        engine: which engine, and how it is used.
        against: what grows.
        sizes: how far.
        build: the run at a size.
    """

    engine: str
    against: str
    sizes: tuple[int, ...]
    build: Callable[[int], Run]


DECADES = (10, 32, 100, 316, 1000, 3162, 10_000)
TEXT = "text, packed"
FREE = "UNet, free"
FORCED = "UNet, teacher-forced"


def chosen(population: Sequence[Any], count: int) -> list[Any]:
    return random.Random(0).sample(list(population), count)


# The text engine: a random CLIP encoder, noise on its tokens 1 and 2.


@cache
def encoder_of(layers: int, width: int, length: int) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        max_position_embeddings=length, vocab_size=1000, bos_token_id=998, eos_token_id=999, pad_token_id=999,
    )  # fmt: skip
    return CLIPTextModel(config).eval().requires_grad_(False)


def text_run(
    layers: int = 12,
    width: int = 256,
    length: int = 77,
    count: int | None = None,
    prompts: int = 1,
    max_rows: int | None = None,
) -> Run:
    """Every attention and MLP restored at every token; or ``count`` of them, each at two tokens."""
    encoder = encoder_of(layers, width, length)
    sites = [site for site in ft.discover_sites(encoder) if site.kind != "hidden"]
    tokens: list[list[int]] = [[token] for token in range(length)]
    if count is not None:
        tokens = [list(pair) for pair in combinations(range(1, length), 2)]
    patches = [ft.Patch(site, positions) for site in sites for positions in tokens]
    patches = patches if count is None else chosen(patches, count)
    requests = []
    for prompt in range(prompts):
        generator = torch.Generator().manual_seed(prompt)
        noise = torch.zeros(length, width)
        noise[1:3] = 0.1 * torch.randn(2, width, generator=generator)
        ids = torch.randint(0, 998, (length,), generator=generator)
        requests.append(text_request(encoder, ids, patches, noise, max_rows=max_rows))
    flops = prompts * packed_text.plan_of(requests[0]).flops(width, 4 * width)
    return lambda: [run_text_request(request).restored.shape for request in requests], flops / 1e9


# The UNet engine: the packaged model, or its architecture at another width.


@cache
def pipeline(width: int | None = None) -> Any:
    pipe = ft.load_pipeline("emoji", device="cpu")
    if width is None:
        return pipe
    torch.manual_seed(0)
    config = dict(pipe.unet.config) | {"block_out_channels": (width,) * 3}
    unet = type(pipe.unet).from_config(config).eval().requires_grad_(False)
    return type(pipe)(**pipe.components | {"unet": unet}, requires_safety_checker=False)


def sites_of(every: int = 1) -> list[str]:
    return [site.name for site in ft.discover_sites(pipeline()) if site.part == "unet"][::every]


def unet_run(
    patches: Sequence[PatchSet],
    protocol: str = "free",
    steps: int = 4,
    tokens: int = 20,
    width: int | None = None,
    max_batch: int | None = None,
) -> Run:
    pipe = pipeline(width)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted, negative = torch.randn(3, tokens, pipe.unet.config.cross_attention_dim, generator=generator)
    request = unet_request(
        pipe, clean, corrupted, patches, None, 0, steps, 7.5, negative, None, None, None, None, "corrupted", protocol,
        0.0, max_batch,
    )  # fmt: skip
    return lambda: run_request(request), 1e3 * plan_summary([request]).tflop


def each(every: int = 1) -> list[ft.Patch]:
    return [ft.Patch(site) for site in sites_of(every)]


def pairs(count: int) -> list[PatchSet]:
    """Runs that restore two sites at every step."""
    return chosen([tuple(ft.Patch(site) for site in pair) for pair in combinations(sites_of(), 2)], count)


def cells(count: int) -> list[PatchSet]:
    """Runs that restore two sites at one of 20 steps."""
    found = [(pair, step) for pair in combinations(sites_of(), 2) for step in range(20)]
    return [tuple(ft.Patch(site, steps=[step]) for site in pair) for pair, step in chosen(found, count)]


def study_run(prompts: int) -> Run:
    """A whole study: text, every UNet site at both of two steps, pictures, scores."""
    nouns = ("apple", "penguin", "mushroom", "owl")
    texts = [f"a {colour} {noun}" for colour in ("red", "blue", "green", "yellow") for noun in nouns]
    given = [ft.Prompt(text, subject=text.split()[-1]) for text in texts[:prompts]]
    study = ft.Study(pipeline(), given, sites="unet", num_inference_steps=2)
    return lambda: ft.run(study, progress=False, pictures=0), 1e3 * study.plan().estimate().tflop


def forced_run(count: int) -> Run:
    return unet_run(cells(count), "teacher_forced", steps=20)


CURVES: dict[str, tuple[Curve, ...]] = {
    "text": (
        Curve(TEXT, "patches", DECADES, lambda size: text_run(count=size)),
        Curve(TEXT, "prompts", (1, 2, 4, 8, 16), lambda size: text_run(layers=4, prompts=size)),
        Curve(TEXT, "tokens", (10, 19, 38, 77, 154), lambda size: text_run(length=size)),
        Curve(TEXT, "model width", (64, 128, 256, 512, 1024), lambda size: text_run(layers=4, width=size)),
        Curve(TEXT, "batch size", (256, 1024, 4096, 16384), lambda size: text_run(max_rows=size)),
    ),
    "unet": (
        # No further: there are 820 pairs, and 10,000 runs through every step would take minutes a call.
        Curve(FREE, "patches", DECADES[:4], lambda size: unet_run(pairs(size))),
        Curve(FORCED, "patches", DECADES, forced_run),
        Curve(FREE, "batch size", (2, 4, 8, 16, 32, 64), lambda size: unet_run(each(), max_batch=size)),
        Curve("study", "prompts", (1, 2, 4, 8, 16), study_run),
        Curve(FREE, "tokens", (10, 20, 40, 80, 160, 320, 640), lambda size: unet_run(each(2), tokens=size)),
        Curve(FREE, "denoising steps", (1, 2, 4, 8, 16, 32, 64), lambda size: unet_run(each(5), steps=size)),
        Curve(
            FORCED, "denoising steps", (1, 2, 4, 8, 16, 32, 64),
            lambda size: unet_run(each(5), "teacher_forced", steps=size),
        ),
        Curve(FREE, "model width", (32, 64, 128, 256, 512), lambda size: unet_run(each(4), steps=2, width=size)),
    ),
}  # fmt: skip
