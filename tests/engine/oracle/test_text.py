"""The text oracle against transformers' own outputs, and against models whose weights say what noise and patches do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.sites import part_sites
from tests.engine.text_models import ALL, CLIP, EOS, LANGUAGE, LENGTH, text_model

IDS = torch.tensor([48, 3, 4, 5, 6, 7, EOS, EOS, EOS])
WIDTH = 16


def noise() -> torch.Tensor:
    """On two tokens whose words stand only once in the prompt."""
    drawn = torch.zeros(LENGTH, WIDTH, dtype=torch.float64)
    drawn[3:5] = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn


def oracle(model: Any, patches: Any = (), **options: Any) -> ft.TextTrace:
    return ft.trace_text(model, IDS, patches, noise(), engine="oracle", **options)


def own(model: Any, output: str) -> torch.Tensor:
    """What transformers itself returns."""
    body = model.base_model if hasattr(model, "lm_head") else model
    result = body(input_ids=IDS[None], output_hidden_states=True)
    if output == "pooled":
        projected = getattr(result, "text_embeds", None)
        return (result.pooler_output if projected is None else projected)[0]
    return (result.last_hidden_state if output == "last" else result.hidden_states[-2])[0]


@pytest.mark.parametrize(
    ("name", "output"),
    [*((name, output) for name in ALL for output in ("last", "penultimate")), *((name, "pooled") for name in CLIP)],
)
def test_noise_is_added_to_the_words(name: str, output: str) -> None:
    """As in a model whose word embeddings have it in them."""
    model = text_model(name)
    trace = oracle(model, output=output)
    torch.testing.assert_close(trace.clean, own(model, output), rtol=1e-12, atol=1e-12)
    noisy = copy.deepcopy(model)
    tables = {id(one.weight): one.weight for one in noisy.modules() if isinstance(one, torch.nn.Embedding)}
    for weight in tables.values():
        if weight.shape == noisy.get_input_embeddings().weight.shape:
            weight.data[IDS[3:5]] += noise()[3:5]
    torch.testing.assert_close(trace.corrupted, own(noisy, output), rtol=1e-12, atol=1e-12)
    assert float((trace.corrupted - trace.clean).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_a_zeroed_layer_part_is_one_that_gives_zero(name: str) -> None:
    model = text_model(name)
    for kind in ("self_attn", "mlp"):
        site = next(one for one in part_sites(model, "text_encoder") if one.kind == kind and one.layer == 1)
        silent = copy.deepcopy(model)
        module = next(one for one in part_sites(silent, "text_encoder") if one.name == site.name).module
        last = [one for one in module.modules() if hasattr(one, "weight") and "orm" not in type(one).__name__][-1]
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
        restored = oracle(model, [ft.Patch(site, source=ft.ZERO)], base="clean").restored[0]
        torch.testing.assert_close(restored, own(silent, "last"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "t5", LANGUAGE[0]])
def test_a_compiled_encoder_is_called_uncompiled_and_stays_compiled(name: str) -> None:
    model = copy.deepcopy(text_model(name))
    if name in LANGUAGE:
        model = model.base_model
    runs = [ft.Patch(site, [3]) for site in part_sites(model, "text_encoder")]
    before = oracle(model, runs)
    model._compiled_call_impl = _never
    after = oracle(model, runs)
    assert torch.equal(after.restored, before.restored)
    assert all(not torch.equal(run, after.corrupted) for run in after.restored)
    assert model._compiled_call_impl is _never


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("what is compiled was called, which knows none of the hooks")
