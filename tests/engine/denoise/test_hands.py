"""The user's pipeline: unchanged afterwards, listened to while tracing, and reproduced by the clean run."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fasttrace as ft
from fasttrace.engine.denoise import lockstep
from fasttrace.pipeline import encode_prompt
from tests.engine.unet_cases import both, conditions, difference, unet_sites
from tests.pipelines import tiny_pipeline

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT = "a photo of a cat"


def state(pipe: Any) -> dict[str, Any]:
    """Everything that a trace might leave changed."""
    modules = dict(pipe.unet.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "hooks": {name: (*module._forward_hooks, *module._forward_pre_hooks) for name, module in modules.items()},
        "processors": {name: id(one) for name, one in pipe.unet.attn_processors.items()},
        "weights": {
            name: (id(one), one.data_ptr(), one._version, one.stride(), one.dtype, one.device)
            for name, one in pipe.unet.named_parameters()
        },
        "scheduler": {name: id(value) for name, value in vars(pipe.scheduler).items()},
        "training": {name: module.training for name, module in modules.items()},
        "grad": torch.is_grad_enabled(),
    }


def patches(pipe: Any) -> list[Any]:
    sites = unet_sites(pipe)
    return [ft.Patch(sites[0]), ft.Patch(sites[3], positions=[1], steps=[1]), ft.Patch(sites[5], source=ft.ZERO)]


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_unchanged_afterwards(tiny: Any, protocol: str) -> None:
    before = state(tiny)
    both(tiny, patches(tiny), protocol=protocol, dtype=torch.bfloat16)
    assert state(tiny) == before


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_unchanged_after_an_exception_in_the_middle(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    pipe = tiny_pipeline("tiny-sd15")
    before = state(pipe)
    advance, calls = lockstep.Trajectories.advance, []

    def failing(self: Any, step: int, output: Tensor) -> None:
        calls.append(step)
        if len(calls) == 2:
            raise kind("stop")
        advance(self, step, output)

    monkeypatch.setattr(lockstep.Trajectories, "advance", failing)
    given = conditions(pipe)
    with pytest.raises(kind, match="stop"):
        ft.trace_unet(
            pipe, given["clean_embeds"], given["corrupted_embeds"], patches(pipe), num_inference_steps=4,
            negative_embeds=given["negative_embeds"],
        )  # fmt: skip
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("scheduler", "config", "options"),
    [
        (diffusers.DDIMScheduler, {"clip_sample": False}, {"eta": 0.6}),
        (diffusers.PNDMScheduler, {"skip_prk_steps": True}, {}),
        (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)
def test_clean_is_the_users_own_call(
    tiny_sd15: Any, scheduler: Any, config: dict[str, Any], options: dict[str, float]
) -> None:
    pipe = diffusers.StableDiffusionPipeline(**tiny_sd15.components | {"scheduler": scheduler(**NOISE, **config)},
                                             requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    own = pipe(PROMPT, generator=generator, num_inference_steps=4, guidance_scale=5.0, output_type="latent", **options)
    clean, other = (encode_prompt(pipe, text).embeds for text in (PROMPT, "a red car"))
    trace = ft.trace_unet(
        pipe, clean, other, patches(pipe), seed=11, num_inference_steps=4, guidance_scale=5.0, **options
    )
    torch.testing.assert_close(trace.clean, own.images[0], rtol=1e-4, atol=1e-4)


def test_clean_is_the_users_own_call_of_sdxl() -> None:
    tiny_sdxl = tiny_pipeline("tiny-sdxl", torch.float64)
    generator = torch.Generator().manual_seed(11)
    own = tiny_sdxl(PROMPT, generator=generator, num_inference_steps=3, guidance_scale=5.0, output_type="latent")
    clean, other = (encode_prompt(tiny_sdxl, text) for text in (PROMPT, "a red car"))
    trace = ft.trace_unet(
        tiny_sdxl, clean.embeds, other.embeds, patches(tiny_sdxl), seed=11, num_inference_steps=3,
        guidance_scale=5.0, clean_added=(clean.pooled, clean.time_ids),
    )  # fmt: skip
    torch.testing.assert_close(trace.clean, own.images[0], rtol=1e-8, atol=1e-8)


def test_few_steps_with_the_guidance_scale_as_an_input() -> None:
    """LCM: no unconditional branch, and the scale goes through the time embedding."""
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    config = dict(pipe.unet.config) | {"time_cond_proj_dim": 16}
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config).double().eval().requires_grad_(False)
    pipe.register_to_config(requires_safety_checker=False)
    pipe.scheduler = diffusers.LCMScheduler(**NOISE)
    assert difference(*both(pipe, patches(pipe), num_inference_steps=3)) < 1e-8


def test_an_edit_between_two_traces_is_seen_however_it_was_made() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    given = [ft.Patch(unet_sites(pipe)[2])]
    both(pipe, given)
    convolution = pipe.unet.down_blocks[0].resnets[0].conv1
    with torch.no_grad():
        convolution.weight.mul_(1.5)
    assert difference(*both(pipe, given)) < 1e-8
    convolution.weight.data.mul_(1.5)  # bypasses the version counter
    assert difference(*both(pipe, given)) < 1e-8
    convolution.weight = nn.Parameter(convolution.weight * 0.5, requires_grad=False)
    assert difference(*both(pipe, given)) < 1e-8


def test_lora_and_hooks_act() -> None:
    peft = pytest.importorskip("peft")
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    plain = both(pipe, patches(pipe))[1]
    targets = ["to_q", "to_k", "to_out.0", "conv1"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    pipe.unet.requires_grad_(False)
    pipe.unet.double()
    adapted = both(pipe, patches(pipe))
    assert difference(*adapted) < 1e-8
    assert difference(plain, adapted[1]) > 1e-3
    seen = []
    layer = pipe.unet.up_blocks[1].resnets[0]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output) or output * 0.9)
    hooked = both(pipe, patches(pipe))
    handle.remove()
    assert difference(*hooked) < 1e-8
    assert difference(hooked[1], adapted[1]) > 1e-3
    assert seen
    assert difference(adapted[1], both(pipe, patches(pipe))[1]) < 1e-12


def test_what_a_hook_was_given_is_not_overwritten() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    site = unet_sites(pipe)[0]
    layer = ft.find_site(pipe, site).module
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    both(pipe, [ft.Patch(site), ft.Patch(site, source=ft.ZERO, positions=[1])])
    assert all(torch.equal(kept, copy) for kept, copy in seen)


def test_a_replaced_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    monkeypatch.setattr(pipe.unet.mid_block, "forward", pipe.unet.mid_block.forward)
    with pytest.raises(ft.FasttraceError, match="forward"):
        both(pipe, patches(pipe))


def test_bfloat16_is_as_near_to_the_oracle_as_the_users_own_bfloat16(tiny_sd15: Any) -> None:
    """One call of every site: root mean square of the error at most one and a half times that of the oracle's own."""
    runs = [ft.Patch(site) for site in unet_sites(tiny_sd15)]
    options = {
        "num_inference_steps": 1,
        "protocol": "teacher_forced",
        "latents": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4)),
    }
    oracle, fast = both(tiny_sd15, runs, dtype=torch.bfloat16, **options)
    own, _ = both(tiny_pipeline("tiny-sd15", torch.bfloat16), runs, **options)
    assert fast.restored.dtype == torch.float32
    assert 0 < _error(fast, oracle) < 1.5 * _error(own, oracle)


def _error(trace: ft.UNetTrace, truth: ft.UNetTrace) -> float:
    return float((trace.restored.float() - truth.restored).norm())


def test_a_run_that_is_not_finite_is_named(tiny_sd15: Any) -> None:
    site = unet_sites(tiny_sd15)[0]
    huge = ft.Patch(site, source=ft.Add(torch.full((16,), float("inf"))))
    with pytest.raises(ft.FasttraceError, match=rf"1 runs are not finite.*run 1 \({site}\)"):
        both(tiny_sd15, [(), huge])
