"""The rivals of the benchmarks compute what the oracle computes."""

from __future__ import annotations

from typing import Any

import torch

import fasttrace as ft
from bench.rivals import hooked_batch, picture_of_text_cell


def test_a_hooked_batch_restores_each_site_in_its_own_row(tiny_sd15: Any) -> None:
    tiny_sd15.to(torch.float64)
    texts = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).double()
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    sites = [site for site in ft.discover_sites(tiny_sd15) if site.part == "unet"][1::5]
    found = hooked_batch(tiny_sd15, texts, latents, sites, num_inference_steps=3, guidance_scale=5.0)
    clean, corrupted, negative = texts
    trace = ft.trace_unet(
        tiny_sd15, clean, corrupted, [ft.Patch(site) for site in sites], latents=latents, num_inference_steps=3,
        guidance_scale=5.0, negative_embeds=negative, engine="oracle",
    )  # fmt: skip
    expected = torch.stack([trace.clean, trace.corrupted, *trace.restored])
    assert len({float(one.norm()) for one in expected}) == len(expected)
    assert float((found - expected).norm() / expected.norm()) < 1e-8


def test_a_picture_of_a_text_cell_is_the_studys(tiny_sd15: Any) -> None:
    prompt = ft.Prompt("a photo of an apple", subject="apple")
    site = "text_encoder.encoder.layers.0.mlp"
    seen: list[torch.Tensor] = []

    def keep(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images))

    study = ft.Study(
        tiny_sd15, [prompt], sites=[site], positions="subject_last", metrics=[keep], seeds=[3], num_inference_steps=2
    )
    ft.run(study, engine="oracle", progress=False)
    (tokens,) = study.tokens["text_encoder"].values()
    assert study.sigma is not None
    noise = study.corruption.draw(study.sigma["text_encoder"], 0, len(tokens.ids), tokens.subject, 32)
    (module,) = ft.select_sites(ft.discover_sites(tiny_sd15), [site])
    picture = picture_of_text_cell(
        tiny_sd15, prompt.text, noise, module, [tokens.subject[-1]], 3, num_inference_steps=2
    )
    clean, corrupted, restored = seen[0]
    assert float((clean - restored).abs().max()) > 1e-3
    assert float((corrupted - restored).abs().max()) > 1e-3
    assert float((picture - restored).abs().max()) < 1e-4
