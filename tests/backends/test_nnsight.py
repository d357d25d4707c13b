"""Envoys as addresses of sites, and the cost of a user's own trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fasttrace as ft
from fasttrace.errors import BackendError, SiteError
from fasttrace.profile.flops import flop_counter
from tests.backends.language_models import MODELS, VOCABULARY, language_model
from tests.pipelines import tiny_pipeline

nnsight = pytest.importorskip("nnsight", reason="needs the backends extra: pip install 'fasttrace[backends]'")
backend = pytest.importorskip("fasttrace.backends.nnsight")

IDS = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("tiny-sd15").save_pretrained(folder)
    return nnsight.DiffusionModel(str(folder), dispatch=True)


def test_envoys_of_a_diffusion_model_are_sites(diffusion: Any) -> None:
    block = diffusion.unet.mid_block.attentions[0].transformer_blocks[0]
    named = {
        "unet.mid_block.resnets.0": diffusion.unet.mid_block.resnets[0],
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2": block.attn2,
        "unet.mid_block.attentions.0.transformer_blocks.0": block,
        "text_encoder.encoder.layers.1.mlp": diffusion.text_encoder.encoder.layers[1].mlp,
    }
    assert [backend.site_of(diffusion, envoy).name for envoy in named.values()] == list(named)
    with pytest.raises(SiteError, match="conv_in"):
        backend.site_of(diffusion, diffusion.unet.conv_in)


def test_a_sweep_over_envoys_is_the_study_over_their_sites(diffusion: Any) -> None:
    envoys = [diffusion.unet.mid_block.resnets[0], diffusion.unet.mid_block.resnets[1]]
    options = {"seeds": [0], "metrics": ["latent_l2"], "num_inference_steps": 2}
    prompts = [ft.Prompt("a red apple", subject="apple")]
    effects = backend.sweep(diffusion, envoys, prompts, **options)
    names = [backend.site_of(diffusion, envoy).name for envoy in envoys]
    study = ft.Study(backend.pipeline_of(diffusion), prompts=prompts, sites=names, **options)
    expected = ft.run(study).to_pandas()
    assert effects.to_pandas()["site"].tolist() == names
    assert effects.to_pandas()["restored"].tolist() == pytest.approx(expected["restored"].tolist())


def vector(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


# What is done to token 3 of a value, as the source of a patch and as a nnsight script would write it.
INTERVENTIONS: dict[str, tuple[Callable[[int], Any], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "restore": (lambda width: "other", lambda own, other: other),
    "zero": (lambda width: ft.ZERO, lambda own, other: torch.zeros_like(own)),
    "replace": (vector, lambda own, other: vector(len(own))),
    "add": (lambda width: ft.Add(vector(width)), lambda own, other: own + vector(len(own))),
}


class Traced:
    """A model of nnsight over the one that the engine runs, two prompts, and the Envoys of some of its sites."""

    def __init__(self, engine: Any, layers: Callable[[Any], Any], final: str, base: torch.Tensor, other: torch.Tensor):
        self.engine, self.base, self.other = engine, base, other
        self.model = nnsight.NNsight(engine)
        self.final = self.model.get(final)
        layers = layers(self.model)
        attention = getattr(layers[2], "attn" if hasattr(engine, "transformer") else "self_attn")
        names = ("c_proj", "o_proj", "out_proj")
        self.projection = next(getattr(attention, name) for name in names if hasattr(attention._module, name))
        self.envoys = {"layer 1": layers[1], "MLP 0": layers[0].mlp, "attention 2": attention}
        self.head = backend.site_of(self.model, attention, head=1)

    def check(self, patch: ft.Patch, edit: Callable[[], None]) -> None:
        """The patched run and the edited trace end in the same states, and not in those of the base run."""
        noise = torch.zeros(len(self.base), self.engine.get_input_embeddings().weight.shape[1])
        sources = {"other": self.other}
        trace = ft.trace_text(self.engine, self.base, [patch], noise, base="clean", sources=sources)
        with self.model.trace(self.base[None]):
            edit()
            expected = self.final.output.save()
        scale = expected.abs().max().item()
        torch.testing.assert_close(trace.restored, expected, rtol=1e-5, atol=1e-5 * scale)
        assert (trace.restored - trace.clean).abs().max() > 1e-3 * scale, "the intervention must matter"

    def value(self, envoy: Any) -> torch.Tensor:
        """Token 3 of an Envoy's output on the other prompt."""
        with self.model.trace(self.other[None]):
            output = envoy.output.save()
        return (output[0] if isinstance(output, tuple) else output)[0, 3].clone()


@functools.cache
def traced(name: str) -> Traced:
    if name == "the packaged text encoder":
        pipe = ft.load_pipeline("emoji")
        texts = ("a red penguin in flat style", "a green tractor in flat style")
        base, other = (torch.tensor(pipe.tokenizer(text, padding="max_length").input_ids) for text in texts)
        return Traced(pipe.text_encoder, lambda model: model.encoder.layers, "final_layer_norm", base, other)
    layers, final = (
        (lambda model: model.transformer.h, "transformer.ln_f")
        if name.endswith("gpt2")
        else (lambda model: model.model.layers, "model.norm")
    )
    return Traced(language_model(name, torch.float32), layers, final, IDS, IDS.flip(0))


@pytest.mark.parametrize("what", INTERVENTIONS)
@pytest.mark.parametrize("name", [*MODELS, "the packaged text encoder"])
def test_a_patch_at_an_envoy_does_what_an_nnsight_trace_does(name: str, what: str) -> None:
    setup, (source, new) = traced(name), INTERVENTIONS[what]
    for envoy in setup.envoys.values():
        other = setup.value(envoy)

        def edit(envoy: Any = envoy, other: torch.Tensor = other) -> None:
            hidden = envoy.output[0] if isinstance(envoy.output, tuple) else envoy.output
            hidden[0, 3] = new(hidden[0, 3], other)

        (patch,) = backend.patches(setup.model, [envoy], positions=[3], source=source(len(other)))
        setup.check(patch, edit)


@pytest.mark.parametrize("what", INTERVENTIONS)
@pytest.mark.parametrize("name", [*MODELS, "the packaged text encoder"])
def test_a_patch_of_a_head_does_what_an_nnsight_trace_does(name: str, what: str) -> None:
    setup, (source, new) = traced(name), INTERVENTIONS[what]
    channels = setup.head.channels
    with setup.model.trace(setup.other[None]):
        other = setup.projection.input[0, 3, channels].clone().save()

    def edit() -> None:
        hidden = setup.projection.input
        hidden[0, 3, channels] = new(hidden[0, 3, channels], other)

    setup.check(ft.Patch(setup.head, [3], source=source(len(other))), edit)


def test_an_envoy_without_such_a_head_is_refused() -> None:
    setup = traced("gpt2")
    for envoy, head in ((setup.envoys["attention 2"], 99), (setup.envoys["MLP 0"], 0)):
        with pytest.raises(SiteError, match="heads"):
            backend.site_of(setup.model, envoy, head=head)


def test_the_cost_of_a_trace_counts_calls_rows_and_flops() -> None:
    language = language_model("gpt2", torch.float32)
    model = nnsight.NNsight(language)
    backend_of = backend.CostBackend(model)
    with model.trace(IDS.repeat(3, 1), backend=backend_of):
        model.transformer.h[0].mlp.output[:] = 0
        states = model.transformer.h[2].output.save()
    cost = backend_of.cost
    assert len(states) == 3
    assert cost.forwards == {site.name: 1 for site in backend._all_sites(model)}
    assert set(cost.rows.values()) == {3}
    tokens, layers = 3 * len(IDS), 3
    products = layers * (4 * 32 * 32 + 2 * 32 * 128) + 32 * VOCABULARY
    attention = layers * 2 * len(IDS) * 32
    assert cost.flops == 2 * tokens * (products + attention)
    assert "GFLOP" in cost.summary()
    assert not language.transformer.h[0].mlp._forward_hooks


def test_the_cost_of_a_diffusion_trace_is_that_of_its_pipelines_call(diffusion: Any) -> None:
    backend_of = backend.CostBackend(diffusion)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5}
    with diffusion.generate("a red apple", backend=backend_of, **options):
        diffusion.unet.mid_block.resnets[0].output[:] = 0
    cost = backend_of.cost
    pipe = backend.pipeline_of(diffusion)
    pipe.set_progress_bar_config(disable=True)
    counters = flop_counter(), FlopCounterMode(display=False)
    for counter in counters:
        with counter, torch.no_grad():
            pipe("a red apple", **options)
    expected, without_attention = (counter.get_total_flops() for counter in counters)
    assert cost.flops == expected > without_attention
    unet = [name for name in cost.forwards if name.startswith("unet.")]
    assert set(unet) == {site.name for site in backend._all_sites(diffusion) if site.part == "unet"}
    assert {(cost.forwards[name], cost.rows[name]) for name in unet} == {(3, 6)}, "PNDM calls once more than steps"
    assert cost.forwards["text_encoder.encoder.layers.0.mlp"] == 2, "the prompt and the empty one"


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="DiffusionModel"):
        backend.pipeline_of(nnsight.NNsight(language_model("gpt2")))
