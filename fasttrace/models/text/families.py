"""The families of text models that are known, and what is asked of a model by its class. A new family is one entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...errors import ModelError
from .description import Call, Family, Layer, TextModel, layer_of

_CLIP = Family(
    models=("CLIPTextModel", "CLIPTextModelWithProjection"),
    layers=("CLIPEncoderLayer",),
    causal=True,
    stack=lambda model: getattr(model, "text_model", model),
    words="embeddings.token_embedding",
    positions="embeddings.position_embedding",
    final_norm="final_layer_norm",
    norm_attn="layer_norm1",
    attention="self_attn",
    norm_mlp="layer_norm2",
    mlp="mlp",
    projections=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
    up=("fc1",),
    activation="activation_fn",
    down="fc2",
    head_width=lambda attention: attention.head_dim,
    scale=lambda attention: attention.scale,
)

# T5 has a second table of words, tied to the encoder's, that its forward does not call. Scores are not scaled.
_T5 = Family(
    models=("T5EncoderModel",),
    layers=("T5Block",),
    causal=False,
    stack=lambda model: model.encoder,
    words="embed_tokens",
    final_norm="final_layer_norm",
    norm_attn="layer.0.layer_norm",
    attention="layer.0.SelfAttention",
    norm_mlp="layer.1.layer_norm",
    mlp="layer.1.DenseReluDense",
    projections=("q", "k", "v"),
    out="o",
    up=("wi", "wi_0", "wi_1"),
    down="wo",
    head_width=lambda attention: attention.key_value_proj_dim,
    scale=lambda attention: 1.0,
    relative=lambda stack, length: stack.block[0].layer[0].SelfAttention.compute_bias(length, length)[0],
)


def _gpt2_scale(attention: Any) -> float:
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale


def _gpt2_check(stack: Any, length: int) -> None:
    if stack.config.add_cross_attention:
        raise ModelError("a GPT-2 with cross-attention is not supported: expected a plain language model")


_GPT2 = Family(
    models=("GPT2Model",),
    layers=("GPT2Block",),
    causal=True,
    stack=lambda model: model,
    words="wte",
    positions="wpe",
    final_norm="ln_f",
    norm_attn="ln_1",
    attention="attn",
    norm_mlp="ln_2",
    mlp="mlp",
    projections=("c_attn",),
    out="c_proj",
    up=("c_fc",),
    activation="act",
    down="c_proj",
    head_width=lambda attention: attention.head_dim,
    scale=_gpt2_scale,
    check=_gpt2_check,
)


def _rotary(stack: Any, length: int) -> tuple[Tensor, Tensor]:
    weight = stack.embed_tokens.weight
    cosine, sine = stack.rotary_emb(weight[:1], torch.arange(length, device=weight.device)[None])
    return cosine[0, :, None], sine[0, :, None]


def _llama_check(stack: Any, length: int) -> None:
    window = getattr(stack.config, "sliding_window", None)
    if window is not None and getattr(stack, "has_sliding_layers", False) and length > window:
        raise ModelError(f"{length} tokens exceed the sliding window of {window}: shorten the prompt")


# Rotary positions, grouped queries, and in Qwen3 a norm on each query and key.
_LLAMA = Family(
    models=("LlamaModel", "Qwen2Model", "Qwen3Model"),
    layers=("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    causal=True,
    stack=lambda model: model,
    words="embed_tokens",
    final_norm="norm",
    norm_attn="input_layernorm",
    attention="self_attn",
    norm_mlp="post_attention_layernorm",
    mlp="mlp",
    projections=("q_proj", "k_proj", "v_proj"),
    head_norms=("q_norm", "k_norm"),
    out="o_proj",
    up=("gate_proj", "up_proj"),
    down="down_proj",
    head_width=lambda attention: attention.head_dim,
    scale=lambda attention: attention.scaling,
    rotary=_rotary,
    check=_llama_check,
)


_FAMILIES = (_CLIP, _T5, _GPT2, _LLAMA)
_BY_MODEL = {name: family for family in _FAMILIES for name in family.models}
_BY_LAYER = {name: family for family in _FAMILIES for name in family.layers}
SUPPORTED = f"{', '.join(_BY_MODEL)}, or a language model that is built on one of them"


def is_supported(model: Any) -> bool:
    """Whether the model's class is that of a known family, its language-modelling head aside."""
    return type(text_body(model)).__name__ in _BY_MODEL


def family_of(model: Any) -> Family:
    """By the class of the model, its language-modelling head aside.

    Raises:
        ModelError: a class that is not known.
    """
    if not is_supported(model):
        raise ModelError(f"{type(model).__name__} is not supported: expected {SUPPORTED}")
    return _BY_MODEL[type(text_body(model)).__name__]


def text_model(model: Any) -> TextModel:
    """The description of a user's model, as its modules are now.

    Raises:
        ModelError: a class that is not known.
    """
    family, stack = family_of(model), _stack(model)
    positions = None if family.positions is None else stack.get_submodule(family.positions)
    layers = tuple(text_layers(model))
    return TextModel(family, stack, word_embedding(model), positions, layers, stack.get_submodule(family.final_norm))


def _stack(model: Any) -> nn.Module:
    stack: nn.Module = family_of(model).stack(text_body(model))
    return stack


def text_layers(model: nn.Module) -> Iterator[Layer]:
    """The layers of known classes in any module, in execution order."""
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__ in _BY_LAYER]
    for number, (path, module) in enumerate(found):
        yield layer_of(_BY_LAYER[type(module).__name__], number, path, module)


def is_causal(model: nn.Module) -> bool:
    """Whether a token of a text model reads only itself and the tokens before it; false of an unknown class."""
    classes = {type(module).__name__ for module in model.modules()} & _BY_LAYER.keys()
    return bool(classes) and all(_BY_LAYER[name].causal for name in classes)


def canonical_path(path: str) -> str:
    """A module's dotted path as sites spell it, without the ``text_model.`` that some versions insert."""
    return path.removeprefix("text_model.")


def text_body(model: Any) -> Any:
    """The stack of layers without a language-modelling head: what yields hidden states."""
    return model.base_model if hasattr(model, "lm_head") else model


def word_embedding(model: Any) -> nn.Embedding:
    """The module that embeds the words.

    Raises:
        ModelError: a class that is not known.
    """
    words: Any = _stack(model).get_submodule(family_of(model).words)
    return words


def text_head(call: Call, model: Any, normed: Tensor, answers: Tensor | None) -> Tensor:
    """Past the final norm, of ``[R, D]``: the answers' logits ``[R, A]``, or CLIP's projection where there is one."""
    if answers is None:
        projection = getattr(model, "text_projection", None)
        return normed if projection is None else call(projection, normed)
    head = model.lm_head
    if type(head) is not nn.Linear:
        return call(head, normed)[:, answers]
    return linear(normed, head.weight[answers], None if head.bias is None else head.bias[answers])


def pooled_token(model: Any, ids: Tensor) -> int:
    """The token of ``ids`` ``[T]`` whose state CLIP pools: the first end of text, as transformers finds it.

    Raises:
        ModelError: a model that pools nothing.
    """
    eos = getattr(_stack(model), "eos_token_id", None)
    if eos is None:
        raise ModelError(f'{type(model).__name__} has no pooled output: use output="last" or "penultimate"')
    # Configurations from before transformers 4.31 say 2, and mean the highest id of the vocabulary.
    return int(ids.argmax() if eos == 2 else (ids == eos).int().argmax())
