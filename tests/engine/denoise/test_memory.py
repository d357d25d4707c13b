"""The model of memory against what a call's tensors take, and the batch size that follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import fasttrace as ft
from fasttrace.engine.denoise import memory
from fasttrace.engine.denoise.cost import cost_of
from fasttrace.engine.denoise.memory import BatchSize, row_bytes
from fasttrace.models import attention, flux, pixart
from fasttrace.models.registry import description_of
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims
from fasttrace.profile.live import LiveBytes
from tests.models.transformer_cases import TOKENS, Call


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_model_of_memory_is_near_what_a_call_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where the true shapes cost nothing: within a half, and not far too low."""
    # Real devices compute attention without its matrix of scores; the meta device would allocate it.
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    pipe = ft.zoo.random_pipeline(name, device="meta")
    config, rows, size = pipe.unet.config, 4, (32, 32)
    with torch.device("meta"):
        sample, text = torch.empty(rows, 4, *size), torch.empty(rows, 77, config.cross_attention_dim)
        added = None
        if config.addition_embed_type:
            added = {"text_embeds": torch.empty(rows, 1280), "time_ids": torch.empty(rows, 6)}
        live = LiveBytes()
        with torch.no_grad(), live:
            pipe.unet(sample, torch.empty(rows), text, added_cond_kwargs=added, return_dict=False)
    expected = rows * row_bytes(cost_of(describe_unet(pipe.unet), Dims(*size, 77)), torch.float32)
    assert 0.75 < expected / live.peak < 1.5


def test_a_call_fits_in_the_free_memory(monkeypatch: pytest.MonkeyPatch, tiny_sd15: Any) -> None:
    cost = cost_of(describe_unet(tiny_sd15.unet), Dims(8, 8, 5))
    one = row_bytes(cost, torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 20 * one)
    size = BatchSize(ft.zoo.random_pipeline("tiny-sd15").unet, cost, (8, 8), torch.float32, None)
    assert 10 <= size.rows <= 20
    assert BatchSize(tiny_sd15.unet, cost, (8, 8), torch.float32, 31).rows == 31


@pytest.mark.parametrize("name", ["sd3", "sd35-medium", "flux", "pixart-sigma"])
def test_the_model_of_memory_is_near_what_a_transformers_units_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, flux, pixart):
        monkeypatch.setattr(module, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    call = Call(ft.zoo.random_pipeline(name, device="meta").transformer, 4, (32, 32), "meta")
    description = description_of(call.model)
    assert description is not None
    live = LiveBytes()
    with live:
        call.by_units(description)
    expected = call.rows * row_bytes(cost_of(description, Dims(32, 32, TOKENS)), torch.float32)
    assert 0.75 < expected / live.peak < 1.5
