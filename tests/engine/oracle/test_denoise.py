"""The denoising oracle against the user's own pipeline: its calls, and what a change of its weights does."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fasttrace as ft
from tests.engine.unet_cases import both, conditions, difference, unet_sites
from tests.pipelines import TINY, tiny_pipeline

STEPS, GUIDANCE, SEED = 4, 5.0, 11
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, {"eta": 0.6}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
}


def piped(name: str, scheduler: str) -> tuple[Any, dict[str, float]]:
    """A pipeline with another scheduler, in double precision, and the options that its steps take."""
    tiny = tiny_pipeline(name, torch.float64)
    kind, config, options = SCHEDULERS[scheduler]
    pipe = copy.copy(tiny)
    pipe.scheduler = kind(**NOISE, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


def own_call(pipe: Any, which: str, options: dict[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """By the pipeline itself: final latents, what the UNet read and what it said of the conditional row, by step."""
    given, read, said = conditions(pipe), [], []
    embeds = {"prompt_embeds": given[f"{which}_embeds"][None], "negative_prompt_embeds": given["negative_embeds"][None]}
    if "clean_added" in given:
        embeds["pooled_prompt_embeds"] = given[f"{which}_added"][0][None]
        embeds["negative_pooled_prompt_embeds"] = given["negative_added"][0][None]

    def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        read.append(args[0][-1])
        said.append(output[0][-1])

    handle = pipe.unet.register_forward_hook(see, with_kwargs=True)
    generator = torch.Generator().manual_seed(SEED)
    latents = pipe(
        **embeds, generator=generator, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
        **options,
    ).images[0]  # fmt: skip
    handle.remove()
    return latents, torch.stack(read), torch.stack(said)


def oracle(pipe: Any, patches: Any, options: dict[str, Any]) -> ft.UNetTrace:
    """A trace of the same runs; the time ids are those of the pipeline's own size."""
    given = conditions(pipe)
    clean, corrupted = given.pop("clean_embeds"), given.pop("corrupted_embeds")
    if "clean_added" in given:
        side = float(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        ids = torch.tensor([side, side, 0, 0, side, side])
        given |= {name: (value[0], ids) for name, value in given.items() if name.endswith("_added")}
    return ft.trace_unet(
        pipe, clean, corrupted, patches, seed=SEED, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        engine="oracle", **given, **options,
    )  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_runs_are_the_pipelines_own(name: str, scheduler: str) -> None:
    pipe, options = piped(name, scheduler)
    free = oracle(pipe, [()], options)
    for which in ("clean", "corrupted"):
        latents, read, said = own_call(pipe, which, options)
        torch.testing.assert_close(getattr(free, which), latents, rtol=1e-10, atol=1e-10)
    assert free.inputs is None
    forced = oracle(pipe, [()], {**options, "protocol": "teacher_forced"})
    assert forced.inputs is not None
    torch.testing.assert_close(forced.inputs, read, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forced.corrupted, said, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_a_zeroed_attention_is_one_whose_projection_is_zero(name: str) -> None:
    site = next(site for site in unet_sites(tiny_pipeline(name)) if site.startswith("unet.mid") and "attn2" in site)
    pipe, options = piped(name, "ddim")
    restored = oracle(pipe, [ft.Patch(site, branch="both", source=ft.ZERO)], options).restored[0]
    silent = copy.copy(pipe)
    silent.unet = copy.deepcopy(pipe.unet)
    projection = silent.unet.get_submodule(site.removeprefix("unet.")).to_out[0]
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    trace = oracle(silent, [], options)
    torch.testing.assert_close(restored, trace.corrupted, rtol=1e-10, atol=1e-10)
    assert float((restored - oracle(pipe, [], options).corrupted).abs().max()) > 1e-4


def test_a_compiled_unet_is_called_uncompiled_and_stays_compiled() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    runs = [ft.Patch(site) for site in unet_sites(pipe)[::5]]
    before, _ = both(pipe, runs)
    pipe.unet._compiled_call_impl = pipe.unet.mid_block._compiled_call_impl = _never
    oracle_after, fast_after = both(pipe, runs)
    assert difference(oracle_after, before) == 0
    assert difference(fast_after, before) < 1e-8
    assert all(not torch.equal(run, before.corrupted) for run in oracle_after.restored)
    with pytest.raises(ft.FasttraceError, match="not finite"):
        both(pipe, [ft.Patch(runs[0].site, source=ft.Add(torch.tensor(float("inf")).expand(16)))])
    handle = pipe.unet.conv_out.register_forward_hook(_stop)
    with pytest.raises(RuntimeError, match="stop"):
        both(pipe, runs)
    handle.remove()
    assert pipe.unet._compiled_call_impl is pipe.unet.mid_block._compiled_call_impl is _never


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("what is compiled was called, which knows none of the hooks")


def _stop(*_: Any) -> None:
    raise RuntimeError("stop")
