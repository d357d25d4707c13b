"""diffusers' ``SD3Transformer2DModel`` (SD3 and SD3.5) as a list of units.

Latents ``[C, h, w]`` are cut into patches; every block is a `fasttrace.models.joint_block`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .attention import attend
from .description import Description
from .joint_block import Attend, joint_block
from .transformer import (
    begin_temb,
    begin_text,
    final_modulation,
    finish,
    is_bare,
    merged,
    modulated,
    patches,
    per_position,
    projected,
    rows_of,
    unpatched,
)
from .unit import Forward, Unit


def describe_sd3(model: Any) -> Description:
    """The units of an SD3 or SD3.5 transformer, on any device, ``meta`` included."""
    return Description("transformer", list(_units(model)), ("sample",), ("sample",), is_covered(model))


def is_covered(model: Any) -> bool:
    """Whether the units do all that the model's ``forward`` does without controls, skipped layers or image prompts."""
    blocks = list(model.transformer_blocks)
    if any(type(block).__name__ != "JointTransformerBlock" or block._chunk_size is not None for block in blocks):
        return False
    attentions = [one for block in blocks for one in (block.attn, block.attn2) if one is not None]
    norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    plain = all(
        type(one.processor).__name__ == "JointAttnProcessor2_0" and not getattr(one, "fused_projections", False)
        for one in attentions
    )
    return plain and is_bare(model, model.norm_out, *blocks, *attentions, *norms)


def shared_texts(model: Any, embeds: Tensor) -> Tensor:
    """Every condition ``[K, T, E]`` as the first block reads it, ``[K, T, D]``: the same at every step."""
    texts: Tensor = model.context_embedder(embeds)
    return texts


def time_states(model: Any, timestep: Tensor, pooled: Tensor) -> Tensor:
    """Timestep ``[1 or B]`` and pooled text ``[B, E]`` as blocks read them, ``[B, D]``."""
    states: Tensor = model.time_text_embed(timestep.expand(len(pooled)), pooled)
    return states


def _units(model: Any) -> Iterator[Unit]:
    size, width = model.config.patch_size, model.inner_dim
    image = patches(size)
    flops = per_position(image, model.pos_embed.proj)
    embed, shapes = model.pos_embed, (rows_of(image, width),)
    yield Unit(("sample",), ("image",), lambda _, x: embed(x), (), (embed,), flops, shapes=shapes)
    yield begin_temb()
    yield begin_text(width)
    for index, block in enumerate(model.transformer_blocks):
        yield from joint_block(f"transformer_blocks.{index}", block, width, image, _attend(block))
    yield final_modulation(model.norm_out)
    channels = model.out_channels
    yield finish(model, model.norm_out, image, lambda forward, x: unpatched(forward, x, size, channels))


def _attend(block: Any) -> Attend:
    attn, heads, dual, pre_only = block.attn, block.attn.heads, block.attn2 is not None, block.context_pre_only

    def run(_: Forward, image: Tensor, text: Tensor, mod: Tensor, text_mod: Tensor) -> tuple[Tensor, ...]:
        parts = mod.chunk(9 if dual else 6, dim=-1)
        normed = block.norm1.norm(image)
        x = normed * (1 + parts[1]) + parts[0]
        if pre_only:
            scale, shift = text_mod.chunk(2, dim=-1)
        else:
            shift, scale = text_mod.chunk(6, dim=-1)[:2]
        c = modulated(block.norm1_context.norm, text, shift, scale)
        query = torch.cat(
            [projected(x, attn.to_q, attn.norm_q, heads), projected(c, attn.add_q_proj, attn.norm_added_q, heads)], 2
        )
        key = torch.cat(
            [projected(x, attn.to_k, attn.norm_k, heads), projected(c, attn.add_k_proj, attn.norm_added_k, heads)], 2
        )
        value = torch.cat([projected(x, attn.to_v, None, heads), projected(c, attn.add_v_proj, None, heads)], 2)
        out = merged(attend(query, key, value))
        both_streams = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return (*both_streams, normed * (1 + parts[7]) + parts[6]) if dual else both_streams

    return run
