"""Envoys as addresses of sites, and the cost of a user's own trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.errors import BackendError, SiteError
from tests.backends.language_models import VOCABULARY, language_model
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


def check_restored(owner: Any, envoys: dict[str, Any], final: Any, base: torch.Tensor, other: torch.Tensor) -> None:
    """Copy token 3 from another prompt at each Envoy, as patches and as nnsight traces, and compare final states."""
    model, engine = owner
    width = engine.get_input_embeddings().weight.shape[1]
    runs = backend.patches(model, envoys.values(), positions=[3], source="other")
    noise = torch.zeros(len(base), width)
    trace = ft.trace_text(engine, base, runs, noise, base="clean", sources={"other": other})
    for (name, envoy), restored in zip(envoys.items(), trace.restored, strict=True):
        with model.trace(other[None]):
            value = envoy.output.save()
        value = (value[0] if isinstance(value, tuple) else value)[0, 3]
        with model.trace(base[None]):
            output = envoy.output
            if isinstance(output, tuple):
                output[0][0, 3] = value
            else:
                output[0, 3] = value
            expected = final.output.save()
        scale = expected.abs().max().item()
        torch.testing.assert_close(restored, expected[0], rtol=1e-5, atol=1e-5 * scale, msg=name)
        assert (restored - trace.clean).abs().max() > 1e-3 * scale, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_envoys_of_a_language_model_restore_what_an_nnsight_trace_restores(family: str) -> None:
    language = language_model(family, torch.float32)
    model = nnsight.NNsight(language)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    attention = layers[2].attn if family == "gpt2" else layers[2].self_attn
    final = model.transformer.ln_f if family == "gpt2" else model.model.norm
    envoys = {"layer 1": layers[1], "MLP 0": layers[0].mlp, "attention 2": attention}
    check_restored((model, language), envoys, final, IDS, IDS.flip(0))


def test_envoys_of_the_packaged_text_encoder_restore_what_an_nnsight_trace_restores() -> None:
    pipe = ft.load_pipeline("emoji")
    model = nnsight.NNsight(pipe.text_encoder)
    base, other = (
        torch.tensor(pipe.tokenizer(text, padding="max_length").input_ids)
        for text in ("a red penguin in noto style", "a green tractor in noto style")
    )
    layers = model.encoder.layers
    envoys = {"layer 2": layers[2], "MLP 0": layers[0].mlp, "attention 1": layers[1].self_attn}
    check_restored((model, pipe.text_encoder), envoys, model.final_layer_norm, base, other)


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
    per_token = 2 * (3 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * VOCABULARY)
    assert per_token * 3 * len(IDS) <= cost.flops <= 1.2 * per_token * 3 * len(IDS)
    assert "GFLOP" in cost.summary()
    assert not language.transformer.h[0].mlp._forward_hooks


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="DiffusionModel"):
        backend.pipeline_of(nnsight.NNsight(language_model("gpt2")))
