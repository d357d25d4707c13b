"""Injected runs are those of the user's own pipeline with hooks that hand some cross-attentions another text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.engine.requests.denoise import UNetRequest, unet_request
from fasttrace.pipeline import Condition, encode_negative, encode_prompt
from fasttrace.study.injection import Injection, trace_injected
from fasttrace.study.schedulers import with_scheduler
from tests.pipelines import tiny_pipeline

STEPS, SEED, ETA = 3, 5, 0.4
TEXTS = ("a red apple on a table", "a photo of a small cat")


def injected_by_hooks(pipe: Any, base: Condition, other: Condition, run: Injection, guidance: float) -> Tensor:
    """Final latents ``[C, h, w]`` of one call of the pipeline: the reference, one run and one module at a time."""
    sites, steps = run
    step = -1

    def count(module: Any, args: Any) -> None:
        nonlocal step
        step += 1

    def swap(module: Any, args: Any, kwargs: Any) -> Any:
        if steps is not None and step not in steps:
            return None
        read = kwargs["encoder_hidden_states"].clone()
        read[-1] = other.embeds  # the last row is the conditional one
        return args, {**kwargs, "encoder_hidden_states": read}

    negative = encode_negative(pipe)
    texts = {"prompt_embeds": base.embeds[None], "negative_prompt_embeds": negative.embeds[None]}
    if base.pooled is not None and negative.pooled is not None:
        texts |= {
            "pooled_prompt_embeds": base.pooled[None],
            "negative_pooled_prompt_embeds": negative.pooled[None],
        }
    handles = [pipe.unet.register_forward_pre_hook(count)]
    handles += [site.module.register_forward_pre_hook(swap, with_kwargs=True) for site in sites]
    try:
        made: Tensor = pipe(
            **texts, num_inference_steps=STEPS, guidance_scale=guidance, eta=ETA, output_type="latent",
            generator=torch.Generator().manual_seed(SEED),
        ).images[0]  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return made


def request_of(pipe: Any, base: Condition, guidance: float) -> UNetRequest:
    added = None if base.pooled is None or base.time_ids is None else (base.pooled, base.time_ids)
    return unet_request(
        pipe, base.embeds, base.embeds, [], None, SEED, STEPS, guidance, None, added, added, None, {}, [], "free", ETA,
        None,
    )  # fmt: skip


def some_runs(pipe: Any) -> list[Injection]:
    """One cross-attention alone, at one step, all of them, and none."""
    sites = [site for site in ft.discover_sites(pipe) if site.kind == "cross_attn"]
    return [((sites[0],), None), ((sites[-1],), (1,)), (tuple(sites[::2]), (0, 2)), (tuple(sites), None), ((), None)]


def assert_same_runs(
    pipe: Any, guidance: float, injected: Callable[[UNetRequest, Condition, Condition, Sequence[Injection]], Tensor]
) -> None:
    base, other = (encode_prompt(pipe, text) for text in TEXTS)
    runs = some_runs(pipe)
    made = injected(request_of(pipe, base, guidance), base, other, runs)
    truth = torch.stack([injected_by_hooks(pipe, base, other, run, guidance) for run in runs])
    torch.testing.assert_close(made, truth, rtol=0, atol=1e-8)
    assert all(float((one - truth[-1]).abs().max()) > 1e-6 for one in truth[:-1])


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_ancestral"])
@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_injected_runs_are_the_pipelines_own(name: str, scheduler: str) -> None:
    pipe = with_scheduler(tiny_pipeline(name, torch.float64), scheduler)
    assert_same_runs(pipe, 4.0, lambda *given: trace_injected(*given, max_batch=3))


def test_without_guidance() -> None:
    assert_same_runs(tiny_pipeline("tiny-sd15", torch.float64), 1.0, trace_injected)


def test_sdxl_keeps_the_base_s_pooled_embedding() -> None:
    """All cross-attentions together are not yet the other prompt's run."""
    pipe = tiny_pipeline("tiny-sdxl", torch.float64)
    base, other = (encode_prompt(pipe, text) for text in TEXTS)
    everywhere = some_runs(pipe)[3]
    mixed = Condition(other.embeds, base.pooled, base.time_ids)
    made = trace_injected(request_of(pipe, base, 4.0), base, other, [everywhere])
    torch.testing.assert_close(made[0], injected_by_hooks(pipe, mixed, mixed, ((), None), 4.0), rtol=0, atol=1e-8)
    assert float((made[0] - injected_by_hooks(pipe, other, other, ((), None), 4.0)).abs().max()) > 1e-6


def test_a_compiled_unet_is_called_uncompiled_and_stays_compiled() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    base, other = (encode_prompt(pipe, text) for text in TEXTS)
    runs = some_runs(pipe)
    before = trace_injected(request_of(pipe, base, 4.0), base, other, runs)
    pipe.unet._compiled_call_impl = _never
    assert torch.equal(trace_injected(request_of(pipe, base, 4.0), base, other, runs), before)
    assert pipe.unet._compiled_call_impl is _never


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("what is compiled was called, which knows none of the hooks")
