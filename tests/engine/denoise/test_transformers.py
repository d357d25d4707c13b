"""Diffusion transformers go through the same engine: equal to the oracle, joined at every site, hands clean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fasttrace as ft
from fasttrace.encoding import encode
from fasttrace.engine.denoise import lockstep
from fasttrace.engine.denoise.trace import denoiser_request, plan_summary
from fasttrace.errors import ModelError, PatchError
from fasttrace.models.registry import description_of
from fasttrace.pipeline import encode_prompt
from tests.engine.denoiser_cases import STEPS, both, conditions, latents_of, runs, shape_of, site_names
from tests.engine.unet_cases import difference
from tests.pipelines import tiny_pipeline

TINY = ["tiny-sd3", "tiny-sd35", "tiny-flux", "tiny-pixart"]
FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = ("clean", "corrupted", "other")
PROTOCOLS = ["free", "teacher_forced"]


def piped(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_pipeline(name, dtype)


@FEW
@given(data=st.data())
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TINY)
def test_equal_to_the_oracle_in_float64(name: str, protocol: str, data: st.DataObject) -> None:
    pipe = piped(name)
    patches = data.draw(runs(pipe, ("cond", "uncond", "both") if protocol == "free" else ("cond", "both")))
    base = [data.draw(st.sampled_from(NAMES)) for _ in patches]
    most = data.draw(st.none() | st.integers(1, 64))
    assert difference(*both(pipe, patches, base=base, max_batch=most, protocol=protocol)) < 1e-8


@pytest.mark.parametrize("name", TINY)
def test_without_an_unconditional_branch(name: str) -> None:
    pipe = piped(name)
    every = [ft.Patch(site, steps=[1, 2]) for site in site_names(pipe)[::3]]
    assert difference(*both(pipe, every, guidance_scale=1.0, true_cfg_scale=1.0)) < 1e-8


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TINY)
def test_rows_enter_at_every_site_of_calls_that_begin_anywhere(name: str, protocol: str) -> None:
    """Pictures of another shape than a square too."""
    pipe, size = piped(name), (4, 6)
    every = [ft.Patch(site, steps=[1]) for site in site_names(pipe)]
    options = {"latents": latents_of(pipe, size), "protocol": protocol, "num_inference_steps": 2, "max_batch": 5}
    assert difference(*both(pipe, every, size=size, **options)) < 1e-8


@pytest.mark.parametrize("name", TINY)
def test_heads_and_what_they_are_projected_to(name: str) -> None:
    pipe = piped(name)
    attention = [one for one in site_names(pipe) if one.endswith(".heads.1")][-1].removesuffix(".heads.1")
    heads = tuple(ft.Patch(f"{attention}.heads.{number}", source="other") for number in (0, 1))
    partly = (ft.Patch(attention, positions=[6, 9]), ft.Patch(f"{attention}.heads.0", positions=[7], source=ft.ZERO))
    runs_ = [heads, partly, ft.Patch(f"{attention}.heads.1", source=ft.Add(torch.ones(16, dtype=torch.float64)))]
    for protocol in PROTOCOLS:
        oracle, fast = both(pipe, runs_, protocol=protocol, max_batch=2)
        assert difference(oracle, fast) < 1e-8
        assert not any(torch.equal(run, oracle.corrupted) for run in oracle.restored)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", TINY)
def test_runs_without_an_effective_patch_are_their_base(name: str, protocol: str) -> None:
    pipe = piped(name)
    site = site_names(pipe)[4]
    empty = [(), ft.Patch(site, positions=[]), ft.Patch(site, steps=[])]
    _, fast = both(pipe, empty * 2, protocol=protocol, base=["corrupted"] * 3 + ["clean"] * 3)
    assert all(torch.equal(run, fast.corrupted) for run in fast.restored[:3])
    assert all(torch.equal(run, fast.clean) for run in fast.restored[3:])


def restoring_everything(pipe: Any) -> tuple[ft.Patch, ...]:
    """Both streams of one block; in PixArt one block and every later cross-attention."""
    sites = ["transformer.transformer_blocks.1.image", "transformer.transformer_blocks.1.text"]
    if type(pipe.transformer).__name__ == "PixArtTransformer2DModel":
        sites = ["transformer.transformer_blocks.0", "transformer.transformer_blocks.1.attn2"]
    return tuple(ft.Patch(site) for site in sites)


@pytest.mark.parametrize("engine", ["oracle", "fast"])
@pytest.mark.parametrize("name", TINY)
def test_all_that_a_block_passes_on_gives_the_clean_run_while_pooled_text_is_held_clean(name: str, engine: str) -> None:
    pipe = piped(name)
    given_ = conditions(pipe)
    held = dataclasses.replace(given_["corrupted"], pooled=given_["clean"].pooled, mask=given_["clean"].mask)
    for protocol in PROTOCOLS:
        trace = ft.trace_denoiser(
            pipe, given_["clean"], held, [restoring_everything(pipe), ()], negative=given_["negative"],
            latents=latents_of(pipe), num_inference_steps=STEPS, guidance_scale=3.0, true_cfg_scale=2.0, engine=engine,
            protocol=protocol,
        )  # fmt: skip
        largest = float(trace.clean.abs().max())
        torch.testing.assert_close(trace.restored[0], trace.clean, rtol=0, atol=1e-8 * largest)
        assert float((trace.restored[1] - trace.clean).abs().max()) > 1e-3 * largest


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-sd35", "tiny-flux"])
def test_pooled_text_moves_what_a_blocks_states_do_not(name: str) -> None:
    """Why pooled text is a part of conditions: through it corruption reaches every gate."""
    pipe = piped(name)
    _, fast = both(pipe, [restoring_everything(pipe)])
    assert float((fast.restored[0] - fast.clean).abs().max()) > 1e-4
    described = description_of(pipe.transformer)
    assert described is not None
    modulations = [one for one, point in described.sites.items() if point.kind == "modulation"]
    every = (*restoring_everything(pipe), *(ft.Patch(one) for one in modulations))
    assert difference(*both(pipe, [every])) < 1e-8
    _, fast = both(pipe, [every])
    torch.testing.assert_close(fast.restored[0], fast.clean, rtol=0, atol=1e-8 * float(fast.clean.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", TINY)
def test_clean_is_the_users_own_call(name: str, scale: float) -> None:
    """The unconditional branch is the pipeline's own empty prompt, or for FLUX a prompt that is given."""
    pipe, flux = piped(name), name == "tiny-flux"
    prompt, other = "a photo of a cat", "a red car"
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale}
    given_: dict[str, Any] = {}
    if flux:
        options |= {"guidance_scale": 3.5, "true_cfg_scale": scale}
        given_["negative"] = encode(pipe, other).condition
    generator = torch.Generator().manual_seed(11)
    extra = {"negative_prompt": other} if flux else {}
    own = pipe(prompt, generator=generator, output_type="latent", **options, **extra).images[0]
    clean, corrupted = (encode(pipe, text).condition for text in (prompt, other))
    patches = [ft.Patch(site_names(pipe)[3], steps=[2])]
    trace = ft.trace_denoiser(pipe, clean, corrupted, patches, seed=11, **options, **given_)
    torch.testing.assert_close(trace.clean, own, rtol=0, atol=1e-8 * float(own.abs().max()))


def test_only_the_transformer_and_the_scheduler_are_needed() -> None:
    class Bare:
        transformer = piped("tiny-sd3").transformer
        scheduler = piped("tiny-sd3").scheduler

    site = site_names(piped("tiny-sd3"))[3]
    assert difference(*both(Bare(), [ft.Patch(site)])) < 1e-8
    with pytest.raises(ModelError, match="no negative condition"):
        both(Bare(), [ft.Patch(site)], negative=None)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_embeds": False},
        {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 48},
    ],
)
def test_other_inputs_beside_the_timestep(change: dict[str, Any]) -> None:
    """FLUX.1-schnell takes no guidance scale; PixArt-alpha takes the picture's size."""
    name = "tiny-flux" if "guidance_embeds" in change else "tiny-pixart"
    pipe = ft.zoo.random_pipeline(name, dtype=torch.float64)
    kind = type(pipe.transformer)
    torch.manual_seed(0)
    pipe.transformer = kind.from_config(dict(pipe.transformer.config) | change).double().eval().requires_grad_(False)
    patches = [ft.Patch(site) for site in site_names(pipe)[::4]]
    for size in ((8, 8), (4, 6)):
        assert difference(*both(pipe, patches, latents=latents_of(pipe, size), size=size)) < 1e-8


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl"])
def test_unets_go_through_the_same_call(name: str) -> None:
    pipe = piped(name)
    clean, corrupted = (encode_prompt(pipe, text) for text in ("a photo of a cat", "a red car"))
    patches = [ft.Patch("unet.mid_block.resnets.0"), ()]
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 4}
    added = None if clean.pooled is None or clean.time_ids is None else (clean.pooled, clean.time_ids)
    expected = ft.trace_unet(pipe, clean.embeds, corrupted.embeds, patches, clean_added=added, **options)
    held = dataclasses.replace(corrupted, pooled=clean.pooled)
    trace = ft.trace_denoiser(pipe, clean, held, patches, **options)
    assert torch.equal(trace.restored, expected.restored)
    assert torch.equal(trace.clean, expected.clean)


@pytest.mark.parametrize("name", TINY)
def test_one_batch_of_many_texts(name: str) -> None:
    oracle, fast = both(piped(name), [()] * 4, base=["other", "clean", "other", "corrupted"])
    assert difference(oracle, fast) < 1e-8
    assert torch.equal(fast.restored[0], fast.restored[2])


def state(pipe: Any) -> dict[str, Any]:
    """Everything that a trace might leave changed."""
    modules = dict(pipe.transformer.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "hooks": {name: (*module._forward_hooks, *module._forward_pre_hooks) for name, module in modules.items()},
        "weights": {
            name: (id(one), one.data_ptr(), one._version, one.stride(), one.dtype)
            for name, one in (*pipe.transformer.named_parameters(), *pipe.transformer.named_buffers())
        },
        "scheduler": {name: id(value) for name, value in vars(pipe.scheduler).items()},
    }


@pytest.mark.parametrize("kind", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", TINY)
def test_unchanged_afterwards_and_after_an_exception(monkeypatch: pytest.MonkeyPatch, name: str, kind: Any) -> None:
    pipe = tiny_pipeline(name)
    before = state(pipe)
    patches = [ft.Patch(site, steps=[1]) for site in site_names(pipe)[::5]]
    if kind is None:
        both(pipe, patches, dtype=torch.bfloat16)
        assert state(pipe) == before
        return

    def failing(self: Any, step: int, output: Tensor) -> None:
        raise kind("stop")

    monkeypatch.setattr(lockstep.Trajectories, "advance", failing)
    given_ = conditions(pipe)
    with pytest.raises(kind, match="stop"):
        ft.trace_denoiser(
            pipe, given_["clean"], given_["corrupted"], patches, negative=given_["negative"], latents=latents_of(pipe)
        )
    hook = pipe.transformer.proj_out.register_forward_hook(_stop(kind))
    try:
        with pytest.raises(kind, match="stop"):
            both(pipe, patches)
    finally:
        hook.remove()
    assert state(pipe) == before


def _stop(kind: Any) -> Any:
    def stop(*_: Any) -> None:
        raise kind("stop")

    return stop


@pytest.mark.parametrize("name", TINY)
def test_a_model_that_is_not_covered_runs_by_hooks(name: str) -> None:
    pipe = ft.zoo.random_pipeline(name, dtype=torch.float64)
    patches = [ft.Patch(site, positions=[0]) for site in site_names(pipe)[::4]]
    plain = both(pipe, patches)
    seen = []
    block = pipe.transformer.transformer_blocks[0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        seen.append(1)
        return tuple(1.01 * one for one in output) if isinstance(output, tuple) else 1.01 * output

    handle = block.register_forward_hook(hook)
    hooked = both(pipe, patches, max_batch=5)
    handle.remove()
    assert seen
    assert difference(*hooked) < 1e-8
    assert difference(plain[1], hooked[1]) > 1e-4


def test_an_edit_between_two_traces_is_seen() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd3", dtype=torch.float64)
    patches = [ft.Patch(site_names(pipe)[2])]
    before = both(pipe, patches)
    pipe.transformer.transformer_blocks[1].attn.to_k.weight.data.mul_(1.5)
    after = both(pipe, patches)
    assert difference(*after) < 1e-8
    assert difference(before[1], after[1]) > 1e-4


@pytest.mark.parametrize("name", TINY)
def test_joins_save_forwards_and_the_summary_counts_them(name: str) -> None:
    pipe = piped(name)
    given_ = conditions(pipe)
    every = [ft.Patch(site.name) for site in ft.discover_sites(pipe) if site.part == "transformer"]

    def request(protocol: str) -> Any:
        return denoiser_request(
            pipe, given_["clean"], given_["corrupted"], every, negative=given_["negative"], latents=latents_of(pipe),
            num_inference_steps=STEPS, guidance_scale=3.0, protocol=protocol,
        )  # fmt: skip

    free, forced = plan_summary([request("free")]), plan_summary([request("teacher_forced")])
    assert free.runs == forced.runs == 2 + len(every)
    assert forced.forwards < 0.75 * forced.rows
    assert forced.tflop > 0
    assert forced.memory_bytes > 0


def test_what_does_not_fit_is_refused_with_what_was_expected() -> None:
    pipe = piped("tiny-sd3")
    given_ = conditions(pipe)
    clean = given_["clean"]
    site = site_names(pipe)[3]
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (PatchError, r"clean: embeds has shape \[5, 3\]: expected \[T, 64\]",
         {"clean": ft.Condition(torch.zeros(5, 3), clean.pooled)}),
        (ModelError, "corrupted has no pooled", {"corrupted": ft.Condition(clean.embeds)}),
        (ModelError, "negative has mask, which SD3Transformer2DModel does not take",
         {"negative": dataclasses.replace(clean, mask=torch.ones(5))}),
        (PatchError, "different shapes",
         {"corrupted": ft.Condition(clean.embeds[:3], clean.pooled)}),
        (PatchError, r"expected \[16, h, w\]", {"latents": torch.zeros(4, 8, 8)}),
        (PatchError, "which needs no size", {"size": (4, 4)}),
    ]  # fmt: skip
    for error, match, change in wrong:
        with pytest.raises(error, match=match):
            both(pipe, [ft.Patch(site)], **change)
    flux = piped("tiny-flux")
    with pytest.raises(PatchError, match="24 packed latents are no square"):
        both(flux, [], latents=latents_of(flux, (4, 6)))
    with pytest.raises(PatchError, match=r"expected packed ones, \[P, 64\]"):
        both(flux, [], latents=torch.zeros(16, 8, 8))
    with pytest.raises(PatchError, match="would change nothing"):
        both(flux, [ft.Patch(site_names(flux)[3], branch="uncond")], negative=None)
    with pytest.raises(PatchError, match="trace_text"):
        both(pipe, [ft.Patch("text_encoder.encoder.layers.0.mlp")])
    with pytest.raises(ft.FasttraceError, match=r"nearest: transformer\.transformer_blocks\.0\.attn"):
        both(pipe, [ft.Patch("transformer.transformer_blocks.0.atn.image")])
    with pytest.raises(PatchError, match="position 64"):
        both(flux, [ft.Patch(site_names(flux)[3], positions=[64])])
    assert shape_of(flux, "transformer.norm_out.modulation")[0] == 1


def test_other_and_offloaded_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(ModelError, match=r"Other has a Linear: expected one of .*SD3Transformer2DModel"):
        ft.trace_denoiser(Other(), ft.Condition(torch.zeros(1, 1)), ft.Condition(torch.zeros(1, 1)), [])
    pipe = ft.zoo.random_pipeline("tiny-sd3")
    monkeypatch.setattr(pipe.transformer, "_hf_hook", object(), raising=False)
    with pytest.raises(ModelError, match=r"transformer is offloaded by accelerate: call pipe\.remove_all_hooks"):
        both(pipe, [])
