"""Random inputs for UNet traces, and the fast engine held against the oracle on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fasttrace as ft
from fasttrace.engine.denoise.trace import UNetTrace
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims

TOKENS = 5
STEPS = 3


def texts(pipe: Any, count: int = 4, seed: int = 1) -> Tensor:
    """Text states ``[count, T, D]`` that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    width = pipe.unet.config.cross_attention_dim
    return torch.randn(count, TOKENS, width, generator=generator).to(pipe.unet.dtype)


def conditions(pipe: Any) -> dict[str, Any]:
    """Keywords of a trace with all conditions given: clean, corrupted, negative, and a source called ``other``."""
    embeds = texts(pipe)
    keywords: dict[str, Any] = {"clean_embeds": embeds[0], "corrupted_embeds": embeds[1], "negative_embeds": embeds[2]}
    config = pipe.unet.config
    if config.addition_embed_type is None:
        return keywords | {"sources": {"other": embeds[3]}}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.randn(4, width, generator=torch.Generator().manual_seed(2)).to(embeds.dtype)
    added = [(one, torch.tensor([8.0, 8, 0, 0, 8, 8])) for one in pooled]
    return keywords | {
        "clean_added": added[0],
        "corrupted_added": added[1],
        "negative_added": added[2],
        "sources": {"other": (embeds[3], added[3])},
    }


def unet_sites(pipe: Any) -> list[str]:
    """Names of all UNet sites that `fasttrace.discover_sites` lists."""
    return [site.name for site in ft.discover_sites(pipe) if site.part == "unet"]


def positions_of(pipe: Any, name: str) -> int:
    return describe_unet(pipe.unet).positions(name, Dims(8, 8))


def both(pipe: Any, patches: Any, **keywords: Any) -> tuple[UNetTrace, UNetTrace]:
    """The same trace by the oracle and by the fast engine."""
    given = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | conditions(pipe) | keywords
    clean, corrupted = given.pop("clean_embeds"), given.pop("corrupted_embeds")
    fast_only = {name: given.pop(name) for name in ("compile", "dtype") if name in given}
    oracle = ft.trace_unet(pipe, clean, corrupted, patches, engine="oracle", **given)
    return oracle, ft.trace_unet(pipe, clean, corrupted, patches, **given, **fast_only)


def difference(a: UNetTrace, b: UNetTrace) -> float:
    """Largest difference of any output or input, as a share of the largest clean value."""
    pairs = [(a.clean, b.clean), (a.corrupted, b.corrupted), (a.restored, b.restored)]
    if a.inputs is not None or b.inputs is not None:
        assert a.inputs is not None
        assert b.inputs is not None
        pairs.append((a.inputs, b.inputs))
    largest = max(float((one - two).abs().max()) if one.numel() else 0.0 for one, two in pairs)
    return largest / float(a.clean.abs().max())


def widened(run: tuple[ft.Patch, ...]) -> tuple[ft.Patch, ...]:
    """The same patches, what they add or set in double precision."""

    def source_of(patch: ft.Patch) -> Any:
        if isinstance(patch.source, ft.Add):
            return ft.Add(patch.source.value.double())
        return patch.source.double() if isinstance(patch.source, Tensor) else patch.source

    return tuple(dataclasses.replace(patch, source=source_of(patch)) for patch in run)


@st.composite
def runs(draw: st.DrawFn, pipe: Any, steps: int, branches: tuple[str, ...]) -> list[Any]:
    """Patches of a few runs: one or several each, on any sites, of every source."""
    names = list(describe_unet(pipe.unet).sites)
    return draw(st.lists(st.lists(one_patch(pipe, names, steps, branches), max_size=3).map(tuple), max_size=6))


@st.composite
def one_patch(draw: st.DrawFn, pipe: Any, names: list[str], steps: int, branches: tuple[str, ...]) -> ft.Patch:
    name = draw(st.sampled_from(names))
    count = positions_of(pipe, name)
    positions = draw(st.none() | st.lists(st.integers(0, count - 1), max_size=4))
    when = draw(st.none() | st.lists(st.integers(0, steps - 1), max_size=steps, unique=True))
    source = draw(
        st.sampled_from(["clean", "corrupted", "other", "zero", "noise", "add"])
        | st.builds(ft.Noise, st.just(0.5), st.integers(0, 3))
    )
    if source == "zero":
        source = ft.ZERO
    elif source == "noise":
        source = torch.full((width_of(pipe, name),), 0.5, dtype=pipe.unet.dtype)
    elif source == "add":
        source = ft.Add(torch.full((count, width_of(pipe, name)), 0.25, dtype=pipe.unet.dtype))
    return ft.Patch(name, positions, when, draw(st.sampled_from(branches)), source)


def width_of(pipe: Any, name: str) -> int:
    """Channels of a site's value."""
    module = ft.find_site(pipe, name).module
    for path in ("conv2", "to_out.0", "net.2", "norm1", "proj_out"):
        try:
            child = module.get_submodule(path)
        except AttributeError:
            continue
        return int(child.weight.shape[0])
    raise AssertionError(f"no width for {name}")
