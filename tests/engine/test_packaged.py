"""Both engines on the packaged model, which is trained: the fast ones equal the oracle, and the pipeline's own call."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.encoding import encode
from fasttrace.pipeline import encode_prompt

STEPS = 4


@cache
def emoji() -> Any:
    return ft.load_pipeline("emoji")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@cache
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    clean, corrupted = (encode_prompt(emoji(), f"a {subject} in flat style").embeds for subject in ("penguin", "pizza"))
    return clean, corrupted


@cache
def rounding() -> float:
    """How far the pipeline is from itself between batch 1 and batch 8."""
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    single, batch = (
        emoji()(
            prompt_embeds=texts()[1].expand(rows, -1, -1),
            negative_prompt_embeds=encode_prompt(emoji(), "").embeds.expand(rows, -1, -1),
            latents=start.expand(rows, -1, -1, -1),
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        for rows in (1, 8)
    )
    return relative(batch, single[:1])


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_unet_sweeps_equal_the_oracle(protocol: str) -> None:
    sites = [site for site in ft.discover_sites(emoji()) if site.part == "unet"]
    patches = [ft.Patch(site) for site in sites[::5]]
    patches += [ft.Patch(sites[7], steps=[1, 3]), ft.Patch(sites[2], positions=[0, 9], source=ft.ZERO)]
    options = {"num_inference_steps": STEPS, "protocol": protocol}
    oracle = ft.trace_unet(emoji(), *texts(), patches, engine="oracle", **options)
    fast = ft.trace_unet(emoji(), *texts(), patches, **options)
    assert rounding() > 0
    for name in ("clean", "corrupted", "restored"):
        assert relative(getattr(fast, name), getattr(oracle, name)) <= 10 * rounding(), name
    assert relative(oracle.restored, oracle.corrupted[None].expand_as(oracle.restored)) > 1e-2


def test_the_clean_run_is_the_users_own_call() -> None:
    own = emoji()(
        "a penguin in flat style",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=STEPS,
        output_type="latent",
    ).images[0]
    trace = ft.trace_unet(emoji(), *texts(), [], seed=3, num_inference_steps=STEPS)
    assert relative(trace.clean, own) <= 10 * rounding()


def test_text_sweeps_equal_the_oracle() -> None:
    pipe = emoji()
    prompt = ft.Prompt("a photo of a red wine glass in flat style", "wine glass").tokenize(pipe.tokenizer)
    width, length = pipe.text_encoder.config.hidden_size, len(prompt.ids)
    noise = ft.GaussianNoise(0.5).draw(0.5, 0, length, prompt.subject, width)
    sites = [site for site in ft.discover_sites(pipe) if site.part == "text_encoder"]
    patches = [ft.Patch(site, [token]) for site in sites for token in (0, *prompt.subject, prompt.eos, length - 1)]
    oracle = ft.trace_text(pipe.text_encoder, prompt.ids, patches, noise, engine="oracle")
    fast = ft.trace_text(pipe.text_encoder, prompt.ids, patches, noise)
    assert relative(fast.restored, oracle.restored) <= 1e-5
    assert relative(oracle.restored, oracle.corrupted[None].expand_as(oracle.restored)) > 1e-2


def test_the_packaged_transformer_traces_as_its_pipeline_draws() -> None:
    """Clean latents are the user's own call's; lockstep equals the oracle within float32 on the trained weights."""
    pipe = ft.load_pipeline("emoji-dit")
    clean, corrupted, negative = (
        encode(pipe, text).condition for text in ("a red penguin in flat style", "a blue owl in mosaic style", "")
    )
    sites = [site.name for site in ft.discover_sites(pipe) if site.part == "transformer"][::9]
    options = {"negative": negative, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 3}
    fast, oracle = (
        ft.trace_denoiser(pipe, clean, corrupted, [ft.Patch(site) for site in sites], engine=engine, **options)
        for engine in ("fast", "oracle")
    )
    torch.testing.assert_close(fast.restored, oracle.restored, rtol=1e-4, atol=1e-4)
    own = pipe(
        "a red penguin in flat style", num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    torch.testing.assert_close(fast.clean, own, rtol=1e-5, atol=1e-5)
