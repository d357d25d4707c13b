"""Random inputs for traces of diffusion transformers, and the fast engine held against the oracle on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import fasttrace as ft
from fasttrace.denoisers import denoiser_of
from fasttrace.models.heads import with_heads
from fasttrace.models.registry import description_of
from fasttrace.models.unit import Dims

TOKENS, STEPS, SIZE = 5, 3, (8, 8)
GUIDANCE = 3.0


def latents_of(pipe: Any, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Unit normal latents of a small picture, as the transformer reads them."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    packed = type(pipe.transformer).__name__ == "FluxTransformer2DModel"
    shape = (size[0] * size[1], config.in_channels) if packed else (config.in_channels, *size)
    return torch.randn(*shape, generator=generator).to(pipe.transformer.dtype)


def conditions(pipe: Any) -> dict[str, Any]:
    """Arguments of a trace with all conditions given: clean, corrupted, negative, and a source called ``other``."""
    denoiser, generator = denoiser_of(pipe), torch.Generator().manual_seed(1)

    def condition(place: int) -> ft.Condition:
        embeds = torch.randn(TOKENS, denoiser.text_width, generator=generator, dtype=pipe.transformer.dtype)
        pooled = None
        if denoiser.pooled_width is not None:
            pooled = torch.randn(denoiser.pooled_width, generator=generator, dtype=pipe.transformer.dtype)
        mask = (torch.arange(TOKENS) < 2 + place).long() if denoiser.masked else None
        return ft.Condition(embeds, pooled, mask=mask)

    clean, corrupted, negative, other = map(condition, range(4))
    return {"clean": clean, "corrupted": corrupted, "negative": negative, "sources": {"other": other}}


def site_names(pipe: Any, heads: bool = True) -> list[str]:
    """Every site of the transformer: listed ones, whole blocks, modulations, and one head of each attention."""
    description = description_of(pipe.transformer)
    assert description is not None
    found = [f"{name}.heads.1" for name, point in description.sites.items() if point.heads is not None]
    return [*description.sites, *(found if heads else [])]


def shape_of(pipe: Any, name: str, size: tuple[int, int] = SIZE) -> tuple[int, ...]:
    """Positions and channels of a site's value."""
    description = description_of(pipe.transformer)
    assert description is not None
    return with_heads(description, [name]).sites[name].shape(Dims(*size, TOKENS))


def both(pipe: Any, patches: Any, **keywords: Any) -> tuple[ft.DenoiserTrace, ft.DenoiserTrace]:
    """The same trace by the oracle and by the fast engine."""
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "true_cfg_scale": 2.0}
    given |= {"latents": latents_of(pipe)} | conditions(pipe) | keywords
    clean, corrupted = given.pop("clean"), given.pop("corrupted")
    fast_only = {name: given.pop(name) for name in ("compile", "dtype") if name in given}
    oracle = ft.trace_denoiser(pipe, clean, corrupted, patches, engine="oracle", **given)
    return oracle, ft.trace_denoiser(pipe, clean, corrupted, patches, **given, **fast_only)


@st.composite
def runs(draw: st.DrawFn, pipe: Any, branches: tuple[str, ...]) -> list[Any]:
    """Patches of a few runs: one or several each, on any sites, of every source."""
    names = site_names(pipe)
    return draw(st.lists(st.lists(one_patch(pipe, names, branches), max_size=3).map(tuple), max_size=5))


@st.composite
def one_patch(draw: st.DrawFn, pipe: Any, names: list[str], branches: tuple[str, ...]) -> ft.Patch:
    name, dtype = draw(st.sampled_from(names)), pipe.transformer.dtype
    count, width = shape_of(pipe, name)
    positions = draw(st.none() | st.lists(st.integers(0, count - 1), max_size=4))
    when = draw(st.none() | st.lists(st.integers(0, STEPS - 1), max_size=STEPS, unique=True))
    source: Any = draw(st.sampled_from(["clean", "corrupted", "other", "zero", "tensor", "add", "noise"]))
    made = {
        "zero": ft.ZERO,
        "tensor": torch.full((width,), 0.5, dtype=dtype),
        "add": ft.Add(torch.full((count, width), 0.25, dtype=dtype)),
        "noise": ft.Noise(0.5, 2),
    }
    return ft.Patch(name, positions, when, draw(st.sampled_from(branches)), made.get(source, source))
