"""The packed text engine equals the oracle, for any mix of patches on any family."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fasttrace as ft
from fasttrace.engine.text import TextTrace
from fasttrace.sites import part_sites
from tests.engine.text_models import ALL, CLIP, EOS, LENGTH, VOCABULARY, text_model

WIDTH = 16
IDS = torch.tensor([48, 3, 4, 5, 6, 7, EOS, EOS, EOS])
MASKS = (None, [1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1])

positions = st.one_of(
    st.none(), st.just(()), st.integers(0, LENGTH - 1).map(lambda p: (p,)), st.lists(st.integers(0, LENGTH - 1))
)
seeds = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sources = st.one_of(
    st.sampled_from(("clean", "clean", "corrupted", "other", "late", ft.ZERO)),
    seeds.map(lambda seed: drawn(seed, WIDTH)),
    seeds.map(lambda seed: drawn(seed, LENGTH, WIDTH)),
    seeds.map(lambda seed: ft.Add(drawn(seed, WIDTH))),
    seeds.map(lambda seed: ft.Noise(0.5, seed)),
)


@st.composite
def runs(draw: st.DrawFn, model: Any) -> list[tuple[ft.Patch, ...]]:
    patch = st.builds(ft.Patch, st.sampled_from(part_sites(model, "text_encoder")), positions, source=sources)
    return draw(st.lists(st.lists(patch, max_size=5).map(tuple), max_size=12))


def noise(seed: int, tokens: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    result = torch.zeros(2, LENGTH, WIDTH, dtype=torch.float64)
    result[0, list(tokens)] = drawn(seed, len(tokens), WIDTH)
    result[1, tokens[0]] = 1.0
    return result


def trace(model: Any, patches: Any, engine: str, **options: Any) -> TextTrace:
    late = IDS.clone()
    late[5] = 11
    other = torch.arange(LENGTH) % VOCABULARY
    given_noise = options.pop("noise", noise(0))
    return ft.trace_text(
        model, IDS, patches, given_noise, sources={"other": other, "late": late}, engine=engine, **options
    )


def assert_equal(fast: TextTrace, oracle: TextTrace, tolerance: float = 1e-12) -> None:
    for name in ("clean", "corrupted", "restored"):
        ours, truth = getattr(fast, name), getattr(oracle, name)
        assert ours.shape == truth.shape
        scale = float(oracle.clean.abs().max())
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mix_of_patches(name: str, data: st.DataObject) -> None:
    model = text_model(name)
    patches = data.draw(runs(model))
    options = {
        "base": data.draw(st.sampled_from(("corrupted", "clean"))),
        "output": data.draw(st.sampled_from(("last", "penultimate", *(("pooled",) if name in CLIP else ())))),
        "attention_mask": data.draw(st.sampled_from(MASKS)),
        "noise": noise(data.draw(seeds), data.draw(st.sampled_from(((3, 4), (0,), (2, 7), (8,))))),
    }
    assert_equal(trace(model, patches, "fast", **options), trace(model, patches, "oracle", **options))
