"""Means for mean ablation are those of plain hooks on the user's own calls, one prompt and seed at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.pipeline import encode_prompt
from fasttrace.sites import head_sites
from fasttrace.study.job import Job, Options
from fasttrace.study.means import text_means
from tests.pipelines import tiny_pipeline
from tests.study_cases import APPLE, CAT, study

STEPS, SEEDS, ETA, GUIDANCE = 3, (0, 7), 0.5, 4.0


def seen_by_hook(module: Any, call: Any) -> list[Tensor]:
    """The module's output of the last row, the conditional one, each time that the call runs it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output)[-1])
    )
    try:
        call()
    finally:
        handle.remove()
    return seen


def unet_means_by_hooks(pipe: Any, site: ft.Site) -> Tensor:
    """``[S, C]``: the reference, one call of the pipeline for each prompt and seed."""
    runs = []
    for prompt in (APPLE, CAT):
        for seed in SEEDS:
            values = seen_by_hook(
                site.module,
                lambda prompt=prompt, seed=seed: pipe(
                    prompt.text, generator=torch.Generator().manual_seed(seed), num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE, eta=ETA, output_type="latent",
                ),
            )  # fmt: skip
            spatial = values[0].ndim == 3  # [C, h, w], else [P, D]
            runs.append(torch.stack([value.mean((1, 2)) if spatial else value.mean(0) for value in values]))
    return torch.stack(runs).mean(0)


def means_study(pipe: Any, sites: Any, scheduler: str) -> ft.Study:
    return study(
        pipe, sites=sites, source="mean", base="clean", scheduler=scheduler, num_inference_steps=STEPS, seeds=SEEDS,
        eta=ETA, guidance_scale=GUIDANCE,
    )  # fmt: skip


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_ancestral"])
@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_unet_means_are_those_of_the_pipelines_own_calls(name: str, scheduler: str) -> None:
    pipe = tiny_pipeline(name, torch.float64)
    sites = [site for site in ft.discover_sites(pipe) if site.name.startswith(("unet.mid", "unet.up_blocks.1"))]
    chosen = [
        next(site for site in sites if site.kind == kind) for kind in ("resnet", "self_attn", "cross_attn", "mlp")
    ]
    made = means_study(pipe, [site.name for site in chosen], scheduler)
    means = Job(made.plan(), Options())._means[1]
    assert means.keys() == {site.name for site in chosen}
    for site in chosen:
        truth = unet_means_by_hooks(made.traced_pipe, site)
        torch.testing.assert_close(means[site.name], truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_text_means_are_those_of_the_encoders_own_calls(name: str) -> None:
    """In every encoder the pipeline's own texts, for whole sites and for heads."""
    pipe = tiny_pipeline(name, torch.float64)
    sites = [site for site in ft.discover_sites(pipe) if site.part != "unet"]
    means = text_means(made := means_study(pipe, "text", "ddim"), sites)
    assert means.keys() == {site.name for site in sites}
    for site in sites:
        calls = [
            seen_by_hook(site.module, lambda text=prompt.text: encode_prompt(pipe, text)) for prompt in (APPLE, CAT)
        ]
        assert [len(call) for call in calls] == [1, 1]
        torch.testing.assert_close(means[site.name], (calls[0][0] + calls[1][0]) / 2, rtol=0, atol=1e-8)
    heads = [head for part in made.text_parts for head in head_sites(getattr(pipe, part), part)]
    of_heads = text_means(made, heads)
    projected = {}
    for head in heads:
        weight = head.module.weight[:, head.channels]
        projected[head.module] = projected.get(head.module, head.module.bias) + of_heads[head.name] @ weight.T
    attentions = [site for site in sites if site.kind == "self_attn"]
    for site, whole in zip(attentions, projected.values(), strict=True):
        torch.testing.assert_close(whole, means[site.name], rtol=0, atol=1e-8)


def test_compiled_models_are_called_uncompiled_and_stay_compiled() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    sites = ft.select_sites(ft.discover_sites(pipe), "text_encoder.*.mlp")
    of_text, of_unet = means_study(pipe, "text_encoder.*.mlp", "ddim"), means_study(pipe, "unet.mid*attn2", "ddim")
    before = text_means(of_text, sites), Job(of_unet.plan(), Options())._means[1]
    pipe.unet._compiled_call_impl = _never
    in_unet = Job(of_unet.plan(), Options())._means[1]
    pipe.text_encoder._compiled_call_impl = _never
    for means, other in zip((text_means(of_text, sites), in_unet), before, strict=True):
        assert other
        assert means.keys() == other.keys()
        assert all(torch.equal(means[name], other[name]) for name in other)
    assert pipe.unet._compiled_call_impl is pipe.text_encoder._compiled_call_impl is _never


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("what is compiled was called, which knows none of the hooks")
