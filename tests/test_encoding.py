"""Prompts as pipelines encode them, and noise on the word embeddings of each encoder."""

from __future__ import annotations

import pytest
import torch

import fasttrace as ft
from fasttrace.encoding import encode, word_embeddings
from fasttrace.errors import ModelError
from fasttrace.pipeline import encode_prompt
from tests.pipelines import tiny_pipeline

LENGTHS = {
    "tiny-sd3": {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256},
    "tiny-flux": {"text_encoder": 77, "text_encoder_2": 512},
    "tiny-pixart": {"text_encoder": 300},
    "tiny-sdxl": {"text_encoder": 77, "text_encoder_2": 77},
}


@pytest.mark.parametrize("name", LENGTHS)
def test_every_encoder_reads_the_prompt_at_its_own_length(name: str) -> None:
    pipe = tiny_pipeline(name)
    encoded = encode(pipe, "a red cube")
    assert {part: len(ids) for part, ids in encoded.ids.items()} == LENGTHS[name]
    assert (encoded.mask is not None) == (name == "tiny-pixart")
    assert (encoded.pooled is not None) == (name != "tiny-pixart")


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd21", "tiny-sdxl"])
def test_without_noise_it_is_what_the_pipeline_uses(name: str) -> None:
    pipe = tiny_pipeline(name)
    ours, own = encode(pipe, "a red cube"), encode_prompt(pipe, "a red cube")
    assert torch.equal(ours.embeds, own.embeds)
    assert (ours.pooled is None) == (own.pooled is None)
    if ours.pooled is not None and own.pooled is not None:
        assert torch.equal(ours.pooled, own.pooled)


@pytest.mark.parametrize("name", LENGTHS)
def test_noise_reaches_one_encoder_and_goes_when_it_is_done(name: str) -> None:
    pipe = tiny_pipeline(name)
    clean = encode(pipe, "a red cube")
    for part, ids in clean.ids.items():
        noise = torch.zeros(len(ids), word_embeddings(getattr(pipe, part)).weight.shape[1])
        noise[1] = 3.0
        noised = encode(pipe, "a red cube", {part: noise})
        changed = [not torch.equal(noised.embeds, clean.embeds)]
        if clean.pooled is not None and noised.pooled is not None:
            changed.append(not torch.equal(noised.pooled, clean.pooled))
        assert any(changed)
        assert noised.ids == clean.ids
    assert torch.equal(encode(pipe, "a red cube").embeds, clean.embeds)


def test_noise_on_t5_is_added_to_its_word_embeddings() -> None:
    pipe = tiny_pipeline("tiny-flux")
    ids = encode(pipe, "a red cube").ids["text_encoder_2"]
    noise = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(0))
    t5 = pipe.text_encoder_2
    expected = t5(inputs_embeds=t5.shared(torch.tensor([ids])) + noise)[0][0]
    torch.testing.assert_close(encode(pipe, "a red cube", {"text_encoder_2": noise}).embeds, expected)


def test_a_subject_is_found_in_what_t5_reads() -> None:
    pipe = tiny_pipeline("tiny-sd3")
    tokens = ft.Prompt("a photo of a Zebra", subject="zebra").tokenize(pipe.tokenizer_3)
    assert [tokens.tokens[position] for position in tokens.subject] == ["▁", "Z", "e", "b", "r", "a"]
    assert tokens.ids[: tokens.eos + 1] == encode(pipe, "a photo of a Zebra").ids["text_encoder_3"][: tokens.eos + 1]


def test_parts_and_shapes_that_do_not_fit_are_refused() -> None:
    pipe = tiny_pipeline("tiny-pixart")
    with pytest.raises(ModelError, match="no text_encoder_2 in PixArtSigmaPipeline"):
        encode(pipe, "a red cube", {"text_encoder_2": torch.zeros(1, 1)})
    with pytest.raises(ModelError, match=r"is \[1, 1\]: expected \[300, 64\]"):
        encode(pipe, "a red cube", {"text_encoder": torch.zeros(1, 1)})
