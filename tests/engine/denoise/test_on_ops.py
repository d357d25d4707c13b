"""The UNet's units on ops against the oracle: every kind of site, joins, windows, several maps, both branches."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttrace as ft
from fasttrace.engine.denoise.shadow import shadow_of
from fasttrace.errors import KernelError
from fasttrace.models.unet import describe_unet
from fasttrace.models.unet_ops import describe_unet_on_ops
from tests.engine.unet_cases import STEPS, both, difference, runs, unet_sites

TINY = ["tiny-sd15", "tiny-sd21", "tiny-sdxl"]
OPS = ["attention_restore", "geglu", "group_norm_silu", "linear_restore", "residual_restore"]


@functools.cache
def pipeline(name: str) -> Any:
    return ft.zoo.random_pipeline(name, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _on_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRACE_UNITS", "ops")


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("name", TINY)
def test_every_site(name: str, protocol: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRACE_IMPL", implementation)
    pipe = pipeline(name)
    every = [ft.Patch(site, branch="cond") for site in describe_unet(pipe.unet).sites]
    assert difference(*both(pipe, every, protocol=protocol, num_inference_steps=2, max_batch=9)) < 1e-8


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("name", TINY)
def test_any_mix_of_patches(name: str, protocol: str, data: st.DataObject) -> None:
    pipe = pipeline(name)
    mix = data.draw(runs(pipe, STEPS, ("cond", "uncond", "both") if protocol == "free" else ("cond", "both")))
    assert difference(*both(pipe, mix, protocol=protocol, max_batch=data.draw(st.sampled_from([None, 5])))) < 1e-8


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("name", TINY)
def test_rows_enter_at_every_site_of_calls_that_begin_anywhere(name: str, size: tuple[int, int]) -> None:
    pipe = pipeline(name)
    latents = torch.randn(4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    every = [ft.Patch(site) for site in describe_unet(pipe.unet).sites]
    options = {"latents": latents, "protocol": "teacher_forced", "num_inference_steps": 2, "max_batch": 5}
    assert difference(*both(pipe, every, **options)) < 1e-8


def test_sites_are_the_same_whichever_way_they_run() -> None:
    for name in TINY:
        unet = pipeline(name).unet
        plain, on_ops = describe_unet(unet).sites, describe_unet_on_ops(unet).sites
        assert list(plain) == list(on_ops)
        assert [site.module for site in plain.values()] == [site.module for site in on_ops.values()]


def test_every_op_is_called_and_hooks_are_left_to_modules() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    seen: list[str] = []
    modules = [pipe.unet.mid_block.resnets[0].conv1, pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff]
    handles = [module.register_forward_hook(lambda *_: seen.append("hook")) for module in modules]
    try:
        assert difference(*both(pipe, [ft.Patch(site) for site in unet_sites(pipe)[::5]])) < 1e-8
        hooked = describe_unet_on_ops(shadow_of(pipe.unet, torch.float64))
    finally:
        for handle in handles:
            handle.remove()
    assert seen
    assert sum(len(unit.inside) for unit in hooked.units) == len(unet_sites(pipe)) - 2


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRACE_UNITS", "fast")
    with pytest.raises(KernelError, match="'fast'"):
        both(pipeline("tiny-sd15"), [])
