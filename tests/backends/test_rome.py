"""ROME's functions against its loop, one hooked forward a cell."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttrace.backends import rome
from fasttrace.errors import BackendError, SiteError
from tests.backends import trained
from tests.backends.language_models import MODELS, ROTARY, VOCABULARY, SpaceTokenizer, language_model
from tests.backends.rome_reference import trace_one_cell


def layer_name(family: str, layer: int, kind: str | None) -> str:
    if family.endswith("gpt2"):
        return f"transformer.h.{layer}" + {"attn": ".attn", "mlp": ".mlp", None: ""}[kind]
    return f"model.layers.{layer}" + {"attn": ".self_attn", "mlp": ".mlp", None: ""}[kind]


def reference(family: str, *arguments: Any, **options: Any) -> torch.Tensor:
    return trace_one_cell(language_model(family), *arguments, **options)


def prompt(length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))


CORRUPTIONS: dict[str, dict[str, Any]] = {
    "normal": {"noise": 0.4},
    "uniform": {"uniform_noise": True, "noise": 0.6},
    "replacing": {"replace": True, "noise": 1.0},
    "of one's own": {"noise": lambda draws: draws.cumsum(-1) / 9},
}


def restored(family: str) -> dict[str, list[list[tuple[int, str]]]]:
    """What ROME restores, by name: cells of a sweep."""
    layers, tokens = range(3), range(9)
    name = functools.partial(layer_name, family)
    return {
        "nothing": [[]],
        "hidden": [[(token, name(layer, None))] for token in tokens for layer in layers],
        "mlp": [[(token, name(layer, "mlp"))] for token in tokens for layer in layers],
        "attn": [[(token, name(layer, "attn"))] for token in tokens for layer in layers],
        "window": [[(token, name(layer, "mlp")) for layer in (0, 1)] for token in tokens],
        "mixed": [
            [(1, name(0, "mlp")), (5, name(2, "attn")), (5, name(1, None))],
            [(8, name(0, "attn")), (2, name(0, None))],
        ],
    }


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("what", restored("gpt2"))
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_cell_of_a_sweep_equals_one_hooked_forward(family: str, what: str, corruption: str) -> None:
    ids, span, answers = prompt(), (2, 4), torch.tensor([[5, 7], [11, 3]])
    cells, options = restored(family)[what], CORRUPTIONS[corruption]
    expected = torch.stack([reference(family, ids, cell, answers, span, **options) for cell in cells])
    found = rome.trace_many(language_model(family), {"input_ids": ids.repeat(4, 1)}, cells, answers, span, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    unrestored = reference(family, ids, [], answers, span, **options)
    assert what == "nothing" or (expected - unrestored).abs().max() > 1e-6, "patches must matter"


def test_a_head_by_its_name_is_restored_as_its_share_of_the_projections_input() -> None:
    model, ids, span, answer = language_model("gpt2"), prompt(), (2, 4), torch.tensor(5)
    inp = {"input_ids": ids.repeat(4, 1)}
    found = rome.trace_many(model, inp, [[(3, "transformer.h.0.attn.heads.1")]], answer, span, 0.4)

    def restore(module: Any, args: tuple[torch.Tensor]) -> None:
        args[0][1:, 3, 8:16] = args[0][0, 3, 8:16]

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(restore)
    try:
        expected = reference("gpt2", ids, [], answer, span, noise=0.4)
    finally:
        handle.remove()
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-9)
    assert found[0].item() != pytest.approx(reference("gpt2", ids, [], answer, span, noise=0.4).item(), rel=1e-4)


def test_the_trace_of_a_trained_model_finds_where_it_knows_a_fact() -> None:
    """The key's token early, the last token late; in between the model moves the fact from one to the other."""
    model, key = language_model("trained gpt2"), torch.tensor([4])
    ids, answer = trained.prompts(key, torch.Generator().manual_seed(1))[0], trained.answers(key)[0]
    cells = [[(token, layer_name("gpt2", layer, None))] for token in range(trained.LENGTH) for layer in range(3)]
    span = (trained.SUBJECT, trained.SUBJECT + 1)
    inp = {"input_ids": ids.repeat(11, 1)}
    scores = rome.trace_many(model, inp, cells, answer, span, 2.0).reshape(trained.LENGTH, 3)
    expected = [trace_one_cell(model, ids, cell, answer, span, samples=10, noise=2.0) for cell in cells]
    torch.testing.assert_close(scores.flatten(), torch.stack(expected), rtol=1e-9, atol=1e-12)
    clean = torch.softmax(model(input_ids=ids[None]).logits[0, -1], dim=-1)[answer]
    corrupted = rome.trace_with_patch(model, inp, [], answer, span, 2.0)
    assert clean > 0.9
    assert corrupted < 0.5
    assert scores[-1, 2] == pytest.approx(clean.item(), rel=1e-9), "the last layer's last token is what is read"
    elsewhere = [token for token in range(trained.LENGTH - 1) if token != trained.SUBJECT]
    assert (scores[elsewhere] - corrupted).abs().max() < 0.05


@pytest.mark.parametrize("family", MODELS)
def test_padding_is_not_read(family: str) -> None:
    """Left padding, as batches of prompts of different length have it."""
    ids, span, answer = prompt(), (4, 6), torch.tensor(5)
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1])
    cells = [[(token, layer_name(family, layer, "mlp"))] for token in range(2, 9) for layer in range(3)]
    expected = torch.stack([reference(family, ids, cell, answer, span, mask=mask) for cell in cells])
    inp = {"input_ids": ids.repeat(4, 1), "attention_mask": mask.repeat(4, 1)}
    found = rome.trace_many(language_model(family), inp, cells, answer, span)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    unpadded = rome.trace_many(language_model(family), {"input_ids": ids.repeat(4, 1)}, cells, answer, span)
    assert (found - unpadded).abs().max() > 1e-6, "the padding's own words must matter where they are read"


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("padding", [1, 3])
def test_a_padded_prompt_equals_the_unpadded_one(family: str, padding: int) -> None:
    """Rotary positions act by their differences alone; transformers rounds their table to float32 in every dtype."""
    ids, span, answers = prompt(), (2, 4), torch.tensor([5, 7])
    padded = torch.cat([torch.full((padding,), 11), ids])
    mask = (torch.arange(len(padded)) >= padding).long()

    def cells(shift: int) -> list[list[tuple[int, str]]]:
        kinds = (None, "mlp", "attn")
        return [[(token + shift, layer_name(family, 1, kind))] for token in range(9) for kind in kinds]

    model = language_model(family)
    expected = rome.trace_many(model, {"input_ids": ids.repeat(4, 1)}, cells(0), answers, span, 0.4)
    inp = {"input_ids": padded.repeat(4, 1), "attention_mask": mask.repeat(4, 1)}
    moved = span[0] + padding, span[1] + padding
    found = rome.trace_many(model, inp, cells(padding), answers, moved, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert (expected - expected[0]).abs().max() > 1e-6, "cells must differ"


def test_single_precision_holds_the_promise() -> None:
    ids, span, answer = prompt(), (2, 4), torch.tensor(5)
    cells = [[(token, layer_name("gpt2", 1, None))] for token in range(9)]
    double = torch.stack([reference("gpt2", ids, cell, answer, span) for cell in cells])
    single = rome.trace_many(
        language_model("gpt2", torch.float32), {"input_ids": ids.repeat(4, 1)}, cells, answer, span
    )
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


def test_batch_size_does_not_matter() -> None:
    ids, span, answer = prompt(), (2, 4), torch.tensor(5)
    cells = [[(token, layer_name("llama", layer, "mlp"))] for token in range(9) for layer in range(3)]
    inp = {"input_ids": ids.repeat(4, 1)}
    results = [rome.trace_many(language_model("llama"), inp, cells, answer, span, batch_size=b) for b in (1, 4, 100)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [None, "mlp", "attn"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "trained gpt2"])
def test_hidden_flow_returns_the_originals_dictionary(family: str, kind: str | None) -> None:
    mt = SimpleNamespace(model=language_model(family), tokenizer=SpaceTokenizer())
    text = " the eiffel tower stands in a city called"
    result = rome.calculate_hidden_flow(mt, text, "eiffel tower", samples=3, noise=0.4, window=2, kind=kind)
    ids = torch.tensor(mt.tokenizer(text)["input_ids"])
    with torch.no_grad():
        clean = torch.softmax(mt.model(input_ids=ids[None]).logits[0, -1], dim=-1)
    assert result["subject_range"] == (1, 3)
    assert result["high_score"] == clean.max()
    assert result["answer"] == mt.tokenizer.decode([clean.argmax()])
    low = reference(family, ids, [], clean.argmax(), (1, 3), noise=0.4)
    assert result["low_score"] == pytest.approx(low.item(), rel=1e-9)
    assert result["scores"].shape == (8, 3)
    for token, layer in ((0, 0), (2, 1), (7, 2)):
        window = [layer] if kind is None else range(max(0, layer - 1), min(3, layer + 1))
        states = [(token, layer_name(family, other, kind)) for other in window]
        expected = reference(family, ids, states, clean.argmax(), (1, 3), noise=0.4)
        assert result["scores"][token, layer].item() == pytest.approx(expected.item(), rel=1e-9)
    assert (result["kind"], result["window"], result["correct_prediction"]) == (kind or "", 2, True)


def test_a_wrong_answer_is_not_traced() -> None:
    mt = SimpleNamespace(model=language_model("gpt2"), tokenizer=SpaceTokenizer())
    result = rome.calculate_hidden_flow(mt, " the tower", "tower", expect="no such answer")
    assert result == {"correct_prediction": False}


def test_noise_levels_are_read_as_rome_writes_them() -> None:
    embeddings = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 3) + 2
    assert rome.parse_noise("0.25", embeddings) == (0.25, False)
    assert rome.parse_noise("u0.5", embeddings) == (0.5, True)
    level, uniform = rome.parse_noise("s3", embeddings)
    assert (level, uniform) == (pytest.approx(3 * embeddings.std().item()), False)
    draws = torch.from_numpy(np.random.RandomState(0).randn(400, 50, 3))
    for text in ("m", "t6"):
        transform, _ = rome.parse_noise(text, embeddings)
        assert callable(transform)
        drawn = transform(draws).reshape(-1, 3)
        scale = torch.cov(embeddings.double().T).abs().max().item()
        torch.testing.assert_close(drawn.mean(0), embeddings.double().mean(0), atol=0.05 * scale**0.5, rtol=0)
        torch.testing.assert_close(torch.cov(drawn.T), torch.cov(embeddings.double().T), atol=0.1 * scale, rtol=0)


@pytest.mark.parametrize("text", ["-1", "s", "q3", "t2", "abc", "m-"])
def test_malformed_noise_levels_are_refused(text: str) -> None:
    with pytest.raises(BackendError, match="expected a number"):
        rome.parse_noise(text, torch.randn(10, 3))


def test_what_has_no_counterpart_is_refused() -> None:
    model, ids = language_model("gpt2"), prompt()
    inp = {"input_ids": ids.repeat(3, 1)}
    with pytest.raises(BackendError, match=r"nethook\.TraceDict"):
        rome.trace_with_patch(model, inp, [], 0, None, trace_layers=["transformer.h.0"])
    with pytest.raises(BackendError, match="one prompt repeated"):
        rome.trace_with_patch(model, {"input_ids": torch.stack([ids, ids.flip(0)])}, [], 0, None)
    mask = torch.ones(3, len(ids), dtype=torch.long)
    mask[2, 0] = 0
    with pytest.raises(BackendError, match="attention_mask differs by row"):
        rome.trace_with_patch(model, inp | {"attention_mask": mask}, [], 0, None)
    for span in ((4, 10), (-1, 2), (5, 4)):
        with pytest.raises(BackendError, match="of 9 tokens"):
            rome.trace_with_patch(model, inp, [], 0, span)
    with pytest.raises(SiteError, match=r"transformer\.h\.0"):
        rome.trace_with_patch(model, inp, [(0, "transformer.h.9")], 0, None)
    with pytest.raises(BackendError, match='expected None, "mlp" or "attn"'):
        rome.calculate_hidden_flow(SimpleNamespace(model=model, tokenizer=SpaceTokenizer()), " the", "the", kind="z")
