"""Text traces refuse bad input with a clear error before any forward runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.engine.text.trace import trace_logits
from fasttrace.errors import FasttraceError, ModelError, NumericsError, PatchError, SiteError
from tests.engine.text_models import LENGTH, VOCABULARY, text_model

IDS = torch.arange(LENGTH)
NOISE = torch.zeros(LENGTH, 16)
SITE = "text_encoder.encoder.layers.1.mlp"


@pytest.fixture(params=["fast", "oracle"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (PatchError, "position 9 is out of range: expected 0 to 8", {"patches": [ft.Patch(SITE, [9])]}),
        (PatchError, "position -1", {"patches": [ft.Patch(SITE, [-1])]}),
        (PatchError, "role", {"patches": [ft.Patch(SITE, "subject")]}),
        (PatchError, "runs once", {"patches": [ft.Patch(SITE, [1], steps=[0])]}),
        (PatchError, "guidance", {"patches": [ft.Patch(SITE, [1], branch="both")]}),
        (PatchError, "not among the sources", {"patches": [ft.Patch(SITE, [1], source="other")]}),
        (PatchError, r"shape \[5\], expected \[16\]", {"patches": [ft.Patch(SITE, [1], source=torch.zeros(5))]}),
        (PatchError, r"shape \[5\]", {"patches": [ft.Patch(SITE, [1], source=ft.Add(torch.zeros(5)))]}),
        (PatchError, "expected a Patch", {"patches": ["mlp"]}),
        (
            SiteError,
            "3 layers; no site .* nearest: text_encoder.encoder.layers.2.mlp",
            {"patches": [ft.Patch("text_encoder.encoder.layers.3.mlp", [1])]},
        ),
        (SiteError, "no site", {"patches": [ft.Patch("unet.mid_block.resnets.0", [1])]}),
        (PatchError, r"noise has shape \[9, 15\]: expected \[9, 16\]", {"noise": torch.zeros(LENGTH, 15)}),
        (PatchError, "noise has shape", {"noise": torch.zeros(LENGTH - 1, 16)}),
        (PatchError, "noise has shape float", {"noise": 0.5}),
        (PatchError, "takes at most 9", {"ids": torch.zeros(10), "noise": torch.zeros(10, 16)}),
        (PatchError, r"shape \[1, 9\]: expected \[T\]", {"ids": IDS[None]}),
        (PatchError, f"vocabulary has 0 to {VOCABULARY - 1}", {"ids": IDS + VOCABULARY}),
        (PatchError, "expected one of corrupted, clean", {"base": "restored"}),
        (PatchError, "choose another", {"sources": {"clean": IDS}}),
        (PatchError, r"sources\['other'\] has shape \[4\]", {"sources": {"other": IDS[:4]}}),
        (PatchError, "attention_mask has shape", {"attention_mask": [1, 1]}),
        (PatchError, "max_rows=0", {"max_rows": 0}),
        (PatchError, "position=9: expected 0 to 8", {"position": 9}),
        (PatchError, "read at the end of text", {"position": 3, "output": "pooled"}),
        (PatchError, "out is for states of all tokens", {"position": 3, "out": torch.zeros(0, LENGTH, 16)}),
        (SiteError, "heads", {"patches": [ft.Patch("text_encoder.encoder.layers.1.self_attn.heads.2", [1])]}),
        (
            PatchError,
            r"shape \[16\], expected \[8\]",
            {"patches": [ft.Patch("text_encoder.encoder.layers.1.self_attn.heads.1", source=torch.zeros(16))]},
        ),
        (PatchError, "out is torch.float32", {"out": torch.zeros(3)}),
        (ModelError, "expected one of last, penultimate, pooled", {"output": "first"}),
        (ModelError, "expected one of grouped, ragged", {"attention": "fast"}),
        (ModelError, "clip_skip=3: expected 0 to 2", {"clip_skip": 3}),
        (ModelError, "clip_skip=1 with the pooled", {"clip_skip": 1, "output": "pooled"}),
        (ModelError, 'expected "fast" or "oracle"', {"engine": "quick"}),
    ],
)
def test_bad_input(error: type[FasttraceError], match: str, change: dict[str, Any], engine: str) -> None:
    calls: list[object] = []
    encoder = text_model("clip", torch.float32)
    handle = encoder.embeddings.register_forward_hook(lambda *_: calls.append(1))
    given = {"ids": IDS, "patches": [ft.Patch(SITE, [1])], "noise": NOISE, "engine": engine, **change}
    try:
        with pytest.raises(error, match=match):
            ft.trace_text(encoder, given.pop("ids"), given.pop("patches"), given.pop("noise"), **given)
    finally:
        handle.remove()
    assert not calls


def test_models_that_are_not_supported_are_named_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"Linear is not supported: expected CLIPTextModel.*T5EncoderModel.*Qwen3"):
        ft.trace_text(torch.nn.Linear(2, 2), IDS, [], NOISE)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_only_clip_has_a_pooled_output(name: str) -> None:
    with pytest.raises(ModelError, match="no pooled output"):
        ft.trace_text(text_model(name), IDS, [], NOISE, output="pooled")


def test_the_ragged_op_is_for_causal_models() -> None:
    with pytest.raises(ModelError, match='unlike that of T5EncoderModel: use "grouped"'):
        ft.trace_text(text_model("t5"), IDS, [], NOISE, attention="ragged")


def test_logits_need_a_head_and_answers() -> None:
    with pytest.raises(ModelError, match="lm_head"):
        trace_logits(text_model("clip"), IDS, [], NOISE, [3])
    with pytest.raises(PatchError, match="answers"):
        trace_logits(text_model("gpt2"), IDS, [], NOISE, [])
    with pytest.raises(PatchError, match="position=9"):
        trace_logits(text_model("gpt2"), IDS, [], NOISE, [3], position=9)


def test_active_dropout_is_refused() -> None:
    model = text_model("gpt2")
    model.train()
    try:
        with pytest.raises(ModelError, match=r"call \.eval\(\)"):
            ft.trace_text(model, IDS, [], NOISE)
    finally:
        model.eval()


def test_runs_that_are_not_finite_are_named(engine: str) -> None:
    bad = torch.full((16,), float("nan"))
    patches = [ft.Patch(SITE, [1]), ft.Patch(SITE, [2], source=bad), ft.Patch(SITE, [3])]
    with pytest.raises(NumericsError, match=r"1 text runs are not finite \(first: run 1\)"):
        ft.trace_text(text_model("clip", torch.float32), IDS, patches, NOISE, engine=engine)


@pytest.mark.parametrize("patches", [[], [ft.Patch(SITE, [])]])
def test_a_corrupted_run_that_is_not_finite_is_named(patches: list[ft.Patch], engine: str) -> None:
    noise = NOISE.clone()
    noise[3] = float("inf")
    with pytest.raises(NumericsError, match="the corrupted text run is not finite"):
        ft.trace_text(text_model("clip", torch.float32), IDS, patches, noise, base="clean", engine=engine)
