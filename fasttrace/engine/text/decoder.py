"""What the packed engine knows of a text model: one description for each family, in terms of the user's own modules.

Every layer of a supported family is ``h += attn(norm(h)); h += mlp(norm(h))``. Projections, norms and MLPs are called
as modules, with ``[1, R, D]`` tensors of packed tokens, so that adapters (LoRA) and hooks on them keep working. Hooks
on a whole layer or on an attention module do not fire: the packed engine has its own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .linear import FeedForward, Modules, on_packed

SUPPORTED = "CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, or transformers' GPT-2, Llama, Qwen2 or Qwen3"

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries ``[R, H, d]``, keys and values ``[R, G, d]`` of packed tokens."""


@dataclass(frozen=True)
class DecoderLayer:
    """One layer; ``project(call, x, positions)`` maps normed tokens ``[R, D]`` at ``positions`` ``[R]`` to heads."""

    norm_attn: nn.Module
    project: Callable[[Modules, Tensor, Tensor], Heads]
    out: nn.Module
    scale: float
    norm_mlp: nn.Module
    mlp: FeedForward


@dataclass(frozen=True)
class Decoder:
    """A text model made ready for one prompt length and attention mask.

    Attributes:
        words: the word embeddings' module.
        layers: in execution order.
        causal: whether a token reads only itself and the tokens before it.
        bias: attention bias ``[1 or H, T, T]``: boolean (True where a query may read a key) or added to the scores.
        positions: added to the word embeddings, ``[T, D]``, or ``None``.
        final_norm: after the last layer.
    """

    words: nn.Module
    layers: list[DecoderLayer]
    causal: bool
    bias: Tensor
    positions: Tensor | None
    final_norm: nn.Module

    def embed(self, ids: Tensor, noise: Tensor | None) -> Tensor:
        """The first layer's input ``[T, D]``, noise ``[T, D]`` added to the word embeddings."""
        embedded = on_packed(self.words, ids)
        if noise is not None:
            embedded = embedded + noise
        return embedded if self.positions is None else embedded + self.positions


def text_body(model: Any) -> Any:
    """The stack of layers without a language-modelling head: what yields hidden states."""
    return model.base_model if hasattr(model, "lm_head") else model


def word_embedding(model: Any) -> nn.Embedding:
    """The module that embeds the words; T5 has a second one, tied to it, that its forward does not call."""
    body = text_body(model)
    module: nn.Embedding = body.encoder.embed_tokens if hasattr(body, "shared") else body.get_input_embeddings()
    return module


def text_head(model: Any, normed: Tensor, answers: Tensor | None) -> Tensor:
    """Past the final norm, of ``[R, D]``: the answers' logits ``[R, A]``, or CLIP's projection where there is one."""
    if answers is None:
        projection = getattr(model, "text_projection", None)
        return normed if projection is None else on_packed(projection, normed)
    head = model.lm_head
    if type(head) is not nn.Linear:
        return on_packed(head, normed)[:, answers]
    return nn.functional.linear(normed, head.weight[answers], None if head.bias is None else head.bias[answers])


def is_supported(model: Any) -> bool:
    return type(text_body(model)).__name__ in _FAMILIES


def is_plainly_causal(model: Any) -> bool:
    """Whether a token reads itself and those before it, with no bias on the scores: all families but T5."""
    return _FAMILIES[type(text_body(model)).__name__] is not _t5


def decoder_of(model: Any, length: int, attention_mask: Tensor | None) -> Decoder:
    """Describe a supported model for prompts of ``length`` tokens.

    Raises:
        ModelError: an option of the family that is not supported.
    """
    body = text_body(model)
    return _FAMILIES[type(body).__name__](body, length, attention_mask)


def _allowed(length: int, attention_mask: Tensor | None, device: torch.device, causal: bool) -> Tensor:
    """Which keys each query may read: boolean ``[1, T, T]``."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril()
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[None, :]
    return allowed[None]


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(x.shape[0], -1, head_dim)


def _clip(model: Any, length: int, attention_mask: Tensor | None) -> Decoder:
    text = getattr(model, "text_model", model)

    def layer(block: Any) -> DecoderLayer:
        attn = block.self_attn
        head_dim = attn.head_dim

        def project(call: Modules, x: Tensor, positions: Tensor) -> Heads:
            q, k, v = (_split_heads(call(f, x), head_dim) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
            return q, k, v

        mlp = FeedForward(block.mlp, (block.mlp.fc1, block.mlp.activation_fn, block.mlp.fc2))
        return DecoderLayer(block.layer_norm1, project, attn.out_proj, attn.scale, block.layer_norm2, mlp)

    table = text.embeddings.position_embedding
    numbers = torch.arange(length, device=table.weight.device)
    allowed = _allowed(length, attention_mask, numbers.device, causal=True)
    layers = [layer(block) for block in text.encoder.layers]
    return Decoder(word_embedding(model), layers, True, allowed, table(numbers[None])[0], text.final_layer_norm)


def _t5(model: Any, length: int, attention_mask: Tensor | None) -> Decoder:
    stack = model.encoder

    def layer(block: Any) -> DecoderLayer:
        attention, feed_forward = block.layer
        attn = attention.SelfAttention
        head_dim = attn.key_value_proj_dim

        def project(call: Modules, x: Tensor, positions: Tensor) -> Heads:
            q, k, v = (_split_heads(call(f, x), head_dim) for f in (attn.q, attn.k, attn.v))
            return q, k, v

        mlp = FeedForward(feed_forward.DenseReluDense)
        return DecoderLayer(attention.layer_norm, project, attn.o, 1.0, feed_forward.layer_norm, mlp)

    first = stack.block[0].layer[0].SelfAttention
    bias = first.compute_bias(length, length)[0]
    allowed = _allowed(length, attention_mask, bias.device, causal=False)
    bias = bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)
    layers = [layer(block) for block in stack.block]
    return Decoder(word_embedding(model), layers, False, bias, None, stack.final_layer_norm)


def _gpt2(model: Any, length: int, attention_mask: Tensor | None) -> Decoder:
    if model.config.add_cross_attention:
        raise ModelError("a GPT-2 with cross-attention is not supported: expected a plain language model")

    def layer(block: Any) -> DecoderLayer:
        attn = block.attn
        head_dim = attn.head_dim

        def project(call: Modules, x: Tensor, positions: Tensor) -> Heads:
            q, k, v = (_split_heads(part, head_dim) for part in call(attn.c_attn, x).chunk(3, dim=-1))
            return q, k, v

        mlp = FeedForward(block.mlp, (block.mlp.c_fc, block.mlp.act, block.mlp.c_proj))
        return DecoderLayer(block.ln_1, project, attn.c_proj, _gpt2_scale(attn), block.ln_2, mlp)

    numbers = torch.arange(length, device=model.wpe.weight.device)
    allowed = _allowed(length, attention_mask, numbers.device, causal=True)
    layers = [layer(block) for block in model.h]
    return Decoder(word_embedding(model), layers, True, allowed, model.wpe(numbers[None])[0], model.ln_f)


def _gpt2_scale(attn: Any) -> float:
    scale = attn.head_dim**-0.5 if attn.scale_attn_weights else 1.0
    return scale / (attn.layer_idx + 1) if attn.scale_attn_by_inverse_layer_idx else scale


def _llama(model: Any, length: int, attention_mask: Tensor | None) -> Decoder:
    """Llama, Qwen2 and Qwen3: rotary positions, grouped queries, and in Qwen3 a norm on each query and key."""
    window = getattr(model.config, "sliding_window", None)
    if window is not None and getattr(model, "has_sliding_layers", False) and length > window:
        raise ModelError(f"{length} tokens exceed the sliding window of {window}: shorten the prompt")
    weight = model.embed_tokens.weight
    numbers = torch.arange(length, device=weight.device)
    cosine, sine = (table[0, :, None] for table in model.rotary_emb(weight[:1], numbers[None]))  # [T, 1, d]

    def layer(block: Any) -> DecoderLayer:
        attn = block.self_attn
        head_dim = attn.head_dim

        def rotated(projected: Tensor, norm: nn.Module | None, positions: Tensor) -> Tensor:
            heads = _split_heads(projected, head_dim)
            if norm is not None:
                heads = on_packed(norm, heads)
            first, second = heads.chunk(2, dim=-1)
            return heads * cosine[positions] + torch.cat((-second, first), dim=-1) * sine[positions]

        def project(call: Modules, x: Tensor, positions: Tensor) -> Heads:
            q = rotated(call(attn.q_proj, x), getattr(attn, "q_norm", None), positions)
            k = rotated(call(attn.k_proj, x), getattr(attn, "k_norm", None), positions)
            return q, k, _split_heads(call(attn.v_proj, x), head_dim)

        norms = block.input_layernorm, block.post_attention_layernorm
        return DecoderLayer(norms[0], project, attn.o_proj, attn.scaling, norms[1], FeedForward(block.mlp))

    allowed = _allowed(length, attention_mask, numbers.device, causal=True)
    layers = [layer(block) for block in model.layers]
    return Decoder(word_embedding(model), layers, True, allowed, None, model.norm)


_FAMILIES: dict[str, Callable[[Any, int, Tensor | None], Decoder]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "GPT2Model": _gpt2,
    "LlamaModel": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
}
