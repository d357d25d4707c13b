"""Made-up effects with a known answer, in the columns that studies write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fasttrace.effects.effects import Effects
from fasttrace.sites import Site, discover_sites
from fasttrace.zoo import random_pipeline

WORDS = ("a", "red", "apple", "in", "flat", "style")


def unet_sites(name: str = "tiny-sd15") -> list[Site]:
    return [site for site in discover_sites(random_pipeline(name, device="meta")) if site.part == "unet"]


def text_sites(name: str = "tiny-sd15") -> list[Site]:
    return [site for site in discover_sites(random_pipeline(name, device="meta")) if site.part != "unet"]


def row(prompt: int, seed: int, site: Site, effect: float, /, **changes: Any) -> dict[str, Any]:
    """One row: corrupted 20, clean 30, restored 20 + effect."""
    values = {
        "prompt_id": f"p{prompt:02d}", "prompt": "a red apple in flat style", "attribute": "object", "subject": "apple",
        "seed": seed, "noise_sample": 0, "site": site.name, "part": site.part, "kind": site.kind, "layer": site.layer,
        "position": None, "token": "", "token_role": "all", "step_start": 0, "step_stop": 20, "branch": "cond",
        "base": "corrupted", "source": "clean", "protocol": "free", "metric": "clip_score", "clean": 30.0,
        "corrupted": 20.0, "restored": 20.0 + effect, "total_effect": 10.0, "indirect_effect": effect,
    }  # fmt: skip
    return values | changes


def unet_effects(
    prompts: int = 4, seeds: int = 2, name: str = "tiny-sd15", steps: list[tuple[int, int]] | None = None
) -> Effects:
    """Every UNet site; effects fall with depth and differ by kind, with noise between prompts and seeds."""
    rng = np.random.default_rng(0)
    sites = unet_sites(name)
    strength = {"resnet": 3.0, "self_attn": 2.0, "cross_attn": 1.0, "mlp": 0.5}
    rows = []
    for prompt in range(prompts):
        own = rng.normal(0, 0.6, len(sites))
        for seed in range(seeds):
            for index, site in enumerate(sites):
                for start, stop in steps or [(0, 20)]:
                    middle = 1 - abs((start + stop) / 2 - 8) / 14 if steps else 1
                    effect = strength[site.kind] * middle * (1 + np.sin(index / 4)) + own[index] + rng.normal(0, 0.3)
                    rows.append(row(prompt, seed, site, effect, step_start=start, step_stop=stop))
    return Effects(pd.DataFrame(rows), {})


def text_effects(prompts: int = 1, name: str = "tiny-sd15", length: int = 12) -> Effects:
    """Every text site and token; only layer 0's self-attention at the last subject token restores much."""
    rng = np.random.default_rng(0)
    words = ("<|startoftext|>", *WORDS, "<|endoftext|>", *["<|endoftext|>"] * (length - len(WORDS) - 2))
    roles = ("bos", "before", "before", "subject_last", *["after"] * 3, "eos", *["pad"] * (length - len(WORDS) - 2))
    rows = []
    for prompt in range(prompts):
        for site in text_sites(name):
            for position, (word, role) in enumerate(zip(words, roles, strict=True)):
                effect = rng.normal(0.2, 0.2) if position >= 3 else 0.0
                if role == "subject_last":
                    effect = {"self_attn": 7.0, "mlp": 1.5, "hidden": 8.0}[site.kind] / (1 + site.layer)
                if role == "eos" and site.kind == "hidden":
                    effect += 2.0 * site.layer
                rows.append(row(prompt, 0, site, effect, position=position, token=word, token_role=role))
    return Effects(pd.DataFrame(rows), {})
