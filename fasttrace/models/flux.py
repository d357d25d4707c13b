"""diffusers' ``FluxTransformer2DModel`` (FLUX.1) as a list of units.

First come double blocks (`fasttrace.models.joint_block`), then single ones, in which text and image are one sequence
(value ``joint``, the text first) and attention and MLP run beside each other: what hooks see of them (``.attn`` and
``.mlp``) are the two inputs of their one output projection. Latents are packed, ``[P, C]``; a forward's height and
width count packed latents. Queries and keys are normalised and turned by the rotary tables ``rotary``, cosines and
sines ``[T + P, d]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .description import Description
from .joint_block import Attend, in_range, joint_block
from .transformer import (
    Count,
    attention_flops,
    begin_temb,
    begin_text,
    both,
    final_modulation,
    finish,
    heads_of,
    held,
    is_bare,
    merged,
    modulated,
    modulation,
    patches,
    per_position,
    projected,
    rows_of,
    text_tokens,
    total,
)
from .unit import Forward, SitePoint, Unit


def describe_flux(model: Any) -> Description:
    """The units of a FLUX.1 transformer, on any device, ``meta`` included."""
    return Description("transformer", list(_units(model)), ("sample",), ("sample",), is_covered(model))


def is_covered(model: Any) -> bool:
    """Whether the units do all that the model's ``forward`` does without controls or image prompts."""
    double, single = list(model.transformer_blocks), list(model.single_transformer_blocks)
    if any(type(block).__name__ != "FluxTransformerBlock" for block in double):
        return False
    if any(type(block).__name__ != "FluxSingleTransformerBlock" for block in single):
        return False
    attentions = [block.attn for block in (*double, *single)]
    plain = all(
        type(one.processor).__name__ == "FluxAttnProcessor"
        and not one.fused_projections
        and one.processor._attention_backend is None
        and one.processor._parallel_config is None
        for one in attentions
    )
    norms = [*(norm for block in double for norm in (block.norm1, block.norm1_context)), *(one.norm for one in single)]
    return plain and is_bare(model, model.norm_out, model.pos_embed, *double, *single, *attentions, *norms)


def shared_texts(model: Any, embeds: Tensor) -> Tensor:
    """Every condition ``[K, T, E]`` as the first block reads it, ``[K, T, D]``: the same at every step."""
    texts: Tensor = model.context_embedder(embeds)
    return texts


def rotary_tables(model: Any, tokens: int, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T + P, d]`` of the text's tokens, which have no place, and of the image's ``[P, 3]``."""
    text_ids = torch.zeros(tokens, image_ids.shape[1], dtype=image_ids.dtype, device=image_ids.device)
    cosines, sines = model.pos_embed(torch.cat([text_ids, image_ids]))
    return cosines, sines


def time_states(model: Any, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
    """Timestep ``[1 or B]``, guidance and pooled text ``[B, E]`` as blocks read them, ``[B, D]``.

    Args:
        timestep: as the scheduler counts, 1000 at the beginning.
        guidance: the scale ``[1]`` for models that take it as an input, else ``None``.
    """
    # The pipeline divides by 1000 and the model multiplies: the rounding between is part of what the model sees.
    time = (timestep.expand(len(pooled)).to(pooled.dtype) / 1000) * 1000
    given = [time]
    if guidance is not None:
        given.append(guidance.expand(len(pooled)).to(pooled.dtype) * 1000)
    states: Tensor = model.time_text_embed(*given, pooled)
    return states


def _units(model: Any) -> Iterator[Unit]:
    width, image = model.inner_dim, patches(1)
    embedder = model.x_embedder
    flops, shapes = per_position(image, embedder), (rows_of(image, width),)
    yield Unit(("sample",), ("image",), lambda _, x: embedder(x), (), (embedder,), flops, shapes=shapes)
    yield begin_temb()
    yield begin_text(width)
    for index, block in enumerate(model.transformer_blocks):
        yield from joint_block(f"transformer_blocks.{index}", block, width, image, _attend(block), holds=True)
    for index, block in enumerate(model.single_transformer_blocks):
        yield from _single(f"single_transformer_blocks.{index}", block, width, image)
    yield final_modulation(model.norm_out)
    yield finish(model, model.norm_out, image, lambda _, x: x)


def _attend(block: Any) -> Attend:
    attn, heads = block.attn, block.attn.heads

    def run(forward: Forward, image: Tensor, text: Tensor, mod: Tensor, text_mod: Tensor) -> tuple[Tensor, ...]:
        x = modulated(block.norm1.norm, image, *mod.chunk(6, dim=-1)[:2])
        c = modulated(block.norm1_context.norm, text, *text_mod.chunk(6, dim=-1)[:2])
        query = torch.cat(
            [projected(c, attn.add_q_proj, attn.norm_added_q, heads), projected(x, attn.to_q, attn.norm_q, heads)], 2
        )
        key = torch.cat(
            [projected(c, attn.add_k_proj, attn.norm_added_k, heads), projected(x, attn.to_k, attn.norm_k, heads)], 2
        )
        value = torch.cat([projected(c, attn.add_v_proj, None, heads), projected(x, attn.to_v, None, heads)], 2)
        out = _rotary_attention(forward, query, key, value)
        return out[:, text.shape[1] :], out[:, : text.shape[1]]

    return run


def _rotary_attention(forward: Forward, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    tables = forward.shared["rotary"]
    return merged(scaled_dot_product_attention(turned(query, *tables), turned(key, *tables), value))


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """``[B, H, S, d]``, each pair of neighbouring channels turned by its position's angle; in float32, as FLUX does."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cosines + across.float() * sines).to(x.dtype)


def _single(path: str, block: Any, width: int, image: Count) -> Iterator[Unit]:
    every, inner = both(image), block.mlp_hidden_dim
    attn, heads, norm = block.attn, block.attn.heads, block.norm

    def enter(_: Forward, image: Tensor, text: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([text, image], dim=1)
        return joint, modulated(norm.norm, joint, *mod.chunk(3, dim=-1)[:2])

    def attend(forward: Forward, x: Tensor) -> Tensor:
        query, key = projected(x, attn.to_q, attn.norm_q, heads), projected(x, attn.to_k, attn.norm_k, heads)
        return _rotary_attention(forward, query, key, projected(x, attn.to_v, None, heads))

    def leave(forward: Forward, joint: Tensor, branch: Tensor, mlp: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        joint = in_range(joint + mod[..., 2 * width :] * block.proj_out(torch.cat([branch, mlp], dim=2)))
        return joint[:, forward.dims.tokens :], joint[:, : forward.dims.tokens]

    yield modulation(f"{path}.norm", norm, "modulation")
    wide, alive = rows_of(every, width), held(every, 3 * width)
    streams = ("image", "text", "modulation")
    yield Unit(streams, ("joint", "normed"), enter, (), (norm.norm,), alive=alive, shapes=(wide, wide))
    mlp = SitePoint(f"{path}.mlp", "mlp", "mlp", rows_of(every, inner), block.act_mlp)
    flops, modules = per_position(every, block.proj_mlp), (block.proj_mlp, block.act_mlp)
    alive, shape = held(every, inner), (rows_of(every, inner),)
    run = lambda _, x: block.act_mlp(block.proj_mlp(x))  # noqa: E731
    yield Unit(("normed",), ("mlp",), run, (mlp,), modules, flops, alive, shape)
    point = SitePoint(
        f"{path}.attn", "joint_attn", "branch", wide, attn, heads=heads_of(attn, "branch", block.proj_out)
    )
    flops = total(per_position(every, attn.to_q, attn.to_k, attn.to_v), attention_flops(every, width))
    # What enters, queries, keys and values, and what turning one of them takes.
    alive, products = held(every, 8 * width), (attn.to_q, attn.to_k, attn.to_v)
    yield Unit(("normed",), ("branch",), attend, (point,), products, flops, alive, (wide,))
    sites = (
        SitePoint(f"{path}.text", "hidden", "text", rows_of(text_tokens, width), block, stream="text", listed=False),
        SitePoint(f"{path}.image", "hidden", "image", rows_of(image, width), block, None, "image", 1, False),
    )
    reads, flops = ("joint", "branch", "mlp", "modulation"), per_position(every, block.proj_out)
    # What enters, the two beside each other, and what becomes of their projection.
    alive, shapes = held(every, 2 * (width + inner) + 3 * width), (rows_of(image, width), rows_of(text_tokens, width))
    yield Unit(reads, ("image", "text"), leave, sites, (block.proj_out,), flops, alive, shapes)
