"""Tiny text models of every supported family, with weights large enough that a patch matters."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

VOCABULARY, LENGTH, EOS = 50, 9, 49
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "eos_token_id": EOS,
    "bos_token_id": 48,
}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
}
_GPT2 = {
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": VOCABULARY,
    "n_positions": 16,
    "bos_token_id": 48,
    "eos_token_id": EOS,
}
_T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_heads": 2, "vocab_size": VOCABULARY}

_BUILD = {
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP)),
    "clip-projection": lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**_CLIP, projection_dim=12, hidden_act="gelu")
    ),
    "clip-legacy": lambda: CLIPTextModel(CLIPTextConfig(**{**_CLIP, "eos_token_id": 2})),
    "t5": lambda: T5EncoderModel(T5Config(**_T5)),
    "t5-gated": lambda: T5EncoderModel(T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=6)),
}
CLIP = ("clip", "clip-projection", "clip-legacy")
T5 = ("t5", "t5-gated")
LANGUAGE = ("gpt2", "llama", "qwen2", "qwen3")
ALL = tuple(_BUILD)


@cache
def text_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model that the whole session shares; tests must leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _BUILD[name]()
        for module in model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if "norm" in type(module).__name__.lower():
                    parameter.data = 0.1 * torch.randn_like(parameter) + (kind == "weight")
                else:
                    parameter.data = 0.4 * torch.randn_like(parameter)
        model.tie_weights()
    return model.to(dtype).eval().requires_grad_(False)
