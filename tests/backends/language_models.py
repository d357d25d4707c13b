"""Random tiny models of each family, one that is trained, and a tokenizer that needs no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tests.backends.trained import train

ROTARY = ("llama", "qwen2", "qwen3")
FAMILIES = ("gpt2", *ROTARY)
MODELS = (*FAMILIES, "trained gpt2")
VOCABULARY = 300
WORDS = ("the", "eiffel", "tower", "stands", "in", "a", "city", "called", "paris", "rome", "space", "needle")

_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}


@cache
def language_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A seeded model whose weights are large enough for patches to matter; shared, so leave it as it is."""
    import transformers as t

    if family == "trained gpt2":
        return _trained().to(dtype)
    torch.manual_seed(sum(map(ord, family)))
    if family == "gpt2":
        config = t.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4)
        model = t.GPT2LMHeadModel(config)
    else:
        prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        # pyvene reads a head's width from the configuration, where Qwen2's own has none. Small Qwens tie their head.
        options = {"llama": {}, "qwen2": {"head_dim": 8, "tie_word_embeddings": True}, "qwen3": {"head_dim": 8}}[family]
        model = getattr(t, f"{prefix}ForCausalLM")(getattr(t, f"{prefix}Config")(**_ROTARY, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def _trained() -> Any:
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = t.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.15,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        return train(t.GPT2LMHeadModel(config)).eval().requires_grad_(False)


class SpaceTokenizer:
    """Words with their leading space are tokens, as byte-level BPE makes them of common words."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        return "".join(" " + (WORDS[int(i)] if int(i) < len(WORDS) else f"<{int(i)}>") for i in ids)
