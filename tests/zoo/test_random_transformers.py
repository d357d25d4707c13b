"""Random pipelines with a transformer: the true shapes, and tiny ones that generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.zoo.offline_tokenizer import offline_sentencepiece

PARAMETERS = {
    "sd3": 2_028_328_000,
    "sd35-medium": 2_243_171_520,
    "sd35-large": 8_056_627_520,
    "flux": 11_901_408_320,
    "pixart-sigma": 610_856_096,
}
TINY = ["tiny-sd3", "tiny-sd35", "tiny-flux", "tiny-pixart"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_true_architectures_have_as_many_parameters_as_the_released_ones(name: str) -> None:
    transformer = ft.zoo.random_pipeline(name, device="meta").transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == PARAMETERS[name]


def latents(pipe: Any, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    result: torch.Tensor = pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent").images
    return result


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_pipeline_generates_what_its_seed_and_the_text_say(name: str) -> None:
    pipe = ft.zoo.random_pipeline(name)
    red = latents(pipe, "a red cube")
    assert torch.equal(red, latents(ft.zoo.random_pipeline(name), "a red cube"))
    assert not torch.allclose(red, latents(ft.zoo.random_pipeline(name, seed=1), "a red cube"), rtol=0.1)
    assert (red - latents(pipe, "a blue dog")).std() > 0.05 * red.std()
    side = 256 if name == "tiny-pixart" else 64
    assert pipe("a red cube", num_inference_steps=2).images[0].size == (side, side)


@pytest.mark.parametrize("name", TINY)
def test_both_tables_of_t5_are_one(name: str) -> None:
    pipe = ft.zoo.random_pipeline(name)
    t5 = next(part for part in pipe.components.values() if type(part).__name__ == "T5EncoderModel")
    assert t5.encoder.embed_tokens.weight is t5.shared.weight


def test_sentencepiece_keeps_common_words_and_marks_the_space_before_them() -> None:
    tokenizer = offline_sentencepiece(1000)
    encoded = tokenizer("a red Zebra", return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["▁a", "▁red", "▁", "Z", "e", "b", "r", "a", "</s>"]
    assert encoded["offset_mapping"][:2] == [(0, 1), (2, 5)]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


def test_sentencepiece_has_t5s_ids() -> None:
    tokenizer = offline_sentencepiece(32128)
    assert len(tokenizer) == 32128
    assert tokenizer.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [32028, 32127]
