"""The fast engine equals the oracle on random mixes of patches, at any batch size, under both protocols."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fasttrace as ft
from fasttrace.engine.denoise.shadow import shadow_of
from fasttrace.models.unet import describe_unet
from tests.engine.unet_cases import STEPS, both, conditions, difference, runs, unet_sites, widened
from tests.pipelines import TINY, tiny_pipeline

FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = ("clean", "corrupted", "other")


def drawn(data: st.DataObject, name: str, protocol: str, dtype: torch.dtype) -> tuple[Any, list[Any], dict[str, Any]]:
    pipe = tiny_pipeline(name, dtype)
    patches = data.draw(runs(pipe, STEPS, ("cond", "uncond", "both") if protocol == "free" else ("cond", "both")))
    options = {
        "base": [data.draw(st.sampled_from(NAMES)) for _ in patches],
        "max_batch": data.draw(st.none() | st.integers(1, 64)),
        "protocol": protocol,
    }
    return pipe, patches, options


@FEW
@given(data=st.data())
@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("name", TINY)
def test_equal_in_float64(name: str, protocol: str, data: st.DataObject) -> None:
    pipe, patches, options = drawn(data, name, protocol, torch.float64)
    assert difference(*both(pipe, patches, **options)) < 1e-8


@FEW
@given(data=st.data())
def test_float32_within_five_times_the_rounding_of_the_same_runs(data: st.DataObject) -> None:
    """Patched runs differ in how far they carry a rounding error, so it is the drawn runs' own that is measured."""
    pipe, patches, options = drawn(data, "tiny-sd15", "free", torch.float32)
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    oracle, fast = both(pipe, patches, latents=latents, **options)
    truth, _ = both(in_float64("tiny-sd15"), [widened(run) for run in patches], latents=latents.double(), **options)
    assert difference(oracle, fast) <= 5 * max(
        difference(truth, oracle), carried_rounding(oracle, patches, latents, options)
    )


def carried_rounding(oracle: Any, patches: list[Any], latents: torch.Tensor, options: dict[str, Any]) -> float:
    """How far the float32 oracle moves when its latents do by their last bits.

    A single distance to float64 may be small by luck; the largest of several is not.
    """
    moved = []
    for seed in range(3):
        last_bits = torch.randint(-2, 3, latents.shape, generator=torch.Generator().manual_seed(seed))
        near = latents * (1 + last_bits * torch.finfo(torch.float32).eps)
        moved.append(difference(oracle, both(tiny_pipeline("tiny-sd15"), patches, latents=near, **options)[0]))
    return max(moved)


@cache
def in_float64(name: str) -> Any:
    """The float32 pipeline's own weights, widened."""
    return copy.deepcopy(tiny_pipeline(name)).to(torch.float64)


@FEW
@given(data=st.data())
def test_without_guidance(data: st.DataObject) -> None:
    pipe = tiny_pipeline("tiny-sd15", torch.float64)
    patches = data.draw(runs(pipe, STEPS, ("cond", "both")))
    assert difference(*both(pipe, patches, guidance_scale=1.0)) < 1e-8


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_all_steps_equal_no_steps_named(protocol: str) -> None:
    pipe = tiny_pipeline("tiny-sd15", torch.float64)
    site = unet_sites(pipe)[3]
    _, fast = both(pipe, [ft.Patch(site), ft.Patch(site, steps=range(STEPS + 1))], protocol=protocol)
    torch.testing.assert_close(fast.restored[0], fast.restored[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_runs_without_an_effective_patch_are_their_base(tiny: Any, protocol: str) -> None:
    site = unet_sites(tiny)[2]
    empty = [(), ft.Patch(site, positions=[]), ft.Patch(site, steps=[])]
    _, fast = both(tiny, empty * 2, protocol=protocol, base=["corrupted"] * 3 + ["clean"] * 3)
    assert all(torch.equal(run, fast.corrupted) for run in fast.restored[:3])
    assert all(torch.equal(run, fast.clean) for run in fast.restored[3:])


def test_every_site_restored_under_teacher_forcing_is_clean(tiny: Any) -> None:
    everything = tuple(ft.Patch(name) for name in unet_sites(tiny))
    _, fast = both(tiny, [everything], protocol="teacher_forced")
    torch.testing.assert_close(fast.restored[0], fast.clean, rtol=1e-4, atol=1e-5)


def test_every_cross_attention_restored_with_added_conditions_held_clean_is_clean(tiny: Any) -> None:
    every = tuple(ft.Patch(name) for name in unet_sites(tiny) if name.endswith("attn2"))
    held = {name: value for name, value in conditions(tiny).items() if name != "corrupted_added"}
    given_conditions = {"corrupted_added": held.get("clean_added")}
    _, fast = both(tiny, [every], **given_conditions)
    torch.testing.assert_close(fast.restored[0], fast.clean, rtol=1e-4, atol=1e-4)


def test_one_batch_of_many_texts() -> None:
    """How a study turns text states into pictures: no patches, each run with its own text."""
    pipe = tiny_pipeline("tiny-sd15", torch.float64)
    oracle, fast = both(pipe, [()] * 4, base=["other", "clean", "other", "corrupted"])
    assert difference(oracle, fast) < 1e-8
    assert torch.equal(fast.restored[0], fast.restored[2])


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
@pytest.mark.parametrize("name", TINY)
def test_flat_units_are_the_unet_itself(name: str, size: tuple[int, int]) -> None:
    """A trace without patches calls nothing but the units: its first step is the UNet's own output."""
    pipe = tiny_pipeline(name, torch.float64)
    latents = torch.randn(4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {"latents": latents, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert difference(*both(pipe, [], protocol="teacher_forced", **options)) < 1e-8


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("name", TINY)
def test_rows_enter_at_every_site_of_calls_that_begin_anywhere(name: str, size: tuple[int, int]) -> None:
    pipe = tiny_pipeline(name, torch.float64)
    latents = torch.randn(4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    every = [ft.Patch(site) for site in describe_unet(pipe.unet).sites]
    options = {"latents": latents, "protocol": "teacher_forced", "num_inference_steps": 2, "max_batch": 5}
    assert difference(*both(pipe, every, **options)) < 1e-8


def test_a_unet_that_is_not_covered_runs_by_hooks() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    seen = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(1) or output * 1.01)
    try:
        assert not describe_unet(shadow_of(pipe.unet, torch.float64)).runs
        sites = unet_sites(pipe)
        patches = [ft.Patch(sites[0]), (ft.Patch(sites[4], positions=[1]), ft.Patch(sites[5], source=ft.ZERO))]
        for protocol in ("free", "teacher_forced"):
            assert difference(*both(pipe, patches, protocol=protocol, max_batch=5)) < 1e-8
    finally:
        handle.remove()
    assert seen
    assert describe_unet(shadow_of(pipe.unet, torch.float64)).runs


def test_wrong_source_shape_is_named(tiny_sd15: Any) -> None:
    site = unet_sites(tiny_sd15)[0]
    with pytest.raises(ft.FasttraceError, match=site):
        both(tiny_sd15, [ft.Patch(site, source=torch.zeros(3))])


@pytest.mark.slow
def test_true_shape_of_sd15() -> None:
    """One lockstep step with eight rows at SD1.x's true width: three runs and the two they start from would be ten.

    In float64, which takes 7 GiB of weights: through so many random layers float32 carries its last bits to 1e-4.
    """
    pipe = ft.zoo.random_pipeline("sd15", dtype=torch.float64)
    sites = unet_sites(pipe)
    width = pipe.unet.config.cross_attention_dim
    embeds = torch.randn(3, 77, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = [ft.Patch(sites[9]), ft.Patch(sites[-1], branch="both")]
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    traces = [
        ft.trace_unet(
            pipe, embeds[0], embeds[1], patches, negative_embeds=embeds[2], latents=latents, num_inference_steps=1,
            engine=engine,
        )
        for engine in ("oracle", "fast")
    ]  # fmt: skip
    assert difference(*traces) < 1e-8
