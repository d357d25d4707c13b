"""diffusers' ``PixArtTransformer2DModel`` (PixArt-alpha and -sigma) as a list of units.

One stream, the image, that attends to itself and then to the text (``attn1``, ``attn2``). One modulation, made of the
timestep alone, serves all blocks, each with a table of its own added. The text's keys and values come of the text alone
and are computed once for all steps.

Constants of a forward: ``time`` (``[1 or B, D]``, from `time_states`), ``text`` (``[B]``, each row's number among the
conditions), and shared by all rows ``keys`` (of every condition by path, ``[K, H, T, d]`` twice) and ``bias`` (what is
added to scores of padded tokens, ``[K, 1, 1, T]``, or ``None``). The output may have further channels for the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import attend, is_plain_attention, split_heads
from .description import Description
from .transformer import (
    Count,
    attention_flops,
    heads_of,
    held,
    is_bare,
    merged,
    modulated,
    patches,
    per_position,
    projection,
    rows_of,
    total,
    unpatched,
    widest_of,
)
from .unit import Dims, Forward, SitePoint, Unit


def describe_pixart(model: Any) -> Description:
    """The units of a PixArt transformer, on any device, ``meta`` included."""
    blocks = enumerate(model.transformer_blocks)
    crossing = {f"transformer_blocks.{index}.attn2": block.attn2 for index, block in blocks}
    return Description("transformer", list(_units(model)), ("sample",), ("sample",), is_covered(model), crossing)


def is_covered(model: Any) -> bool:
    """Whether the units do all that the model's ``forward`` does."""
    blocks = list(model.transformer_blocks)
    usual = all(
        type(block).__name__ == "BasicTransformerBlock"
        and block.norm_type == "ada_norm_single"
        and block.pos_embed is None
        and block._chunk_size is None
        and not block.only_cross_attention
        and not hasattr(block, "fuser")
        and is_plain_attention(block.attn1)
        and is_plain_attention(block.attn2)
        for block in blocks
    )
    return usual and is_bare(model, model.adaln_single, *blocks)


def shared_texts(model: Any, embeds: Tensor) -> Tensor:
    """Every condition ``[K, T, E]`` as cross-attentions read it, ``[K, T, D]``."""
    texts: Tensor = embeds if model.caption_projection is None else model.caption_projection(embeds)
    return texts


def padding_bias(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores of padded tokens, ``[K, 1, 1, T]``, of a mask ``[K, T]`` that is 1 where they count."""
    return ((1 - mask.to(like)) * -10000.0)[:, None, None]


def time_states(
    model: Any, timestep: Tensor, rows: int, resolution: Tensor | None, aspect_ratio: Tensor | None
) -> Tensor:
    """Timestep ``[1 or B]`` and, for models that take them, the picture's size, ``[B, D]``."""
    dtype = model.proj_out.weight.dtype
    states: Tensor = model.adaln_single.emb(
        timestep.expand(rows), resolution=resolution, aspect_ratio=aspect_ratio, batch_size=rows, hidden_dtype=dtype
    )
    return states


def _units(model: Any) -> Iterator[Unit]:
    size, width, adaptive = model.config.patch_size, model.inner_dim, model.adaln_single
    image = patches(size)
    flops = per_position(image, model.pos_embed.proj)
    embed, shapes = model.pos_embed, (rows_of(image, width),)
    yield Unit(("sample",), ("image",), lambda _, x: embed(x), (), (embed,), flops, shapes=shapes)

    def modulate(forward: Forward) -> Tensor:
        time = forward.of_rows("time").expand(forward.rows, -1)
        made: Tensor = adaptive.linear(adaptive.silu(time))
        return made.unsqueeze(1)

    point = SitePoint(
        "adaln_single.modulation",
        "modulation",
        "modulation",
        lambda dims: (1, 6 * width),
        adaptive.linear,
        listed=False,
    )
    weights = 2.0 * adaptive.linear.weight.numel()
    yield Unit((), ("modulation",), modulate, (point,), (adaptive.linear,), lambda dims: weights)
    for index, block in enumerate(model.transformer_blocks):
        yield from _block(f"transformer_blocks.{index}", block, width, image)

    def end(forward: Forward, x: Tensor) -> Tensor:
        shift, scale = (model.scale_shift_table[None] + forward.of_rows("time")[:, None]).chunk(2, dim=1)
        return unpatched(forward, model.proj_out(modulated(model.norm_out, x, shift, scale)), size, model.out_channels)

    modules = (model.norm_out, model.proj_out)
    yield Unit(("image",), ("sample",), end, (), modules, per_position(image, model.proj_out))


def _block(path: str, block: Any, width: int, image: Count) -> Iterator[Unit]:
    attn1, attn2, rows = block.attn1, block.attn2, rows_of(image, width)

    def parts(mod: Tensor) -> tuple[Tensor, ...]:
        return (block.scale_shift_table[None] + mod.view(len(mod), 6, -1)).chunk(6, dim=1)

    def heads(_: Forward, x: Tensor, mod: Tensor) -> Tensor:
        x = modulated(block.norm1, x, *parts(mod)[:2])
        query, key, value = (split_heads(one(x), attn1.heads) for one in (attn1.to_q, attn1.to_k, attn1.to_v))
        return merged(attend(query, key, value))

    def crossing(forward: Forward, x: Tensor) -> Tensor:
        text = forward.of_rows("text")
        key, value = (table[text] for table in forward.shared["keys"][f"{path}.attn2"])
        bias = forward.shared["bias"]
        given = None if bias is None else bias[text]
        query = split_heads(attn2.to_q(x), attn2.heads)
        return merged(scaled_dot_product_attention(query, key, value, attn_mask=given))

    def feed_forward(_: Forward, x: Tensor, mod: Tensor) -> Tensor:
        y: Tensor = block.ff(modulated(block.norm2, x, *parts(mod)[3:5]))
        return y

    def gated(number: int) -> Callable[[Forward, Tensor, Tensor, Tensor], Tensor]:
        return lambda _, x, branch, mod: parts(mod)[number] * branch + x

    flops = total(per_position(image, attn1.to_q, attn1.to_k, attn1.to_v), attention_flops(image, width))
    # What enters after its norm; queries, keys and values; what comes out.
    alive = held(image, 5 * width)
    yield Unit(("image", "modulation"), ("heads",), heads, (), (block.norm1,), flops, alive, (rows,))
    inside = heads_of(attn1, "heads", attn1.to_out[0])
    point = SitePoint(f"{path}.attn1", "self_attn", "branch", rows, attn1, heads=inside)
    yield projection(point, attn1.to_out, width, image)
    adds = held(image, 3 * width)
    yield Unit(("image", "branch", "modulation"), ("image",), gated(2), alive=adds, shapes=(rows,))

    def both_products(dims: Dims) -> float:
        return 4 * image(dims) * dims.tokens * width

    flops = total(per_position(image, attn2.to_q), both_products)
    alive = held(lambda dims: image(dims) + dims.tokens, 2 * width)  # queries and what comes out; keys and values
    yield Unit(("image",), ("heads",), crossing, (), (attn2.to_q,), flops, alive, (rows,))
    inside = heads_of(attn2, "heads", attn2.to_out[0])
    point = SitePoint(f"{path}.attn2", "cross_attn", "branch", rows, attn2, heads=inside)
    yield projection(point, attn2.to_out, width, image)
    yield Unit(("image", "branch"), ("image",), lambda _, x, branch: branch + x, alive=adds, shapes=(rows,))

    mlp, modules = SitePoint(f"{path}.ff", "mlp", "branch", rows, block.ff), (block.norm2, block.ff)
    flops, alive = per_position(image, block.ff), held(image, widest_of(block.ff))
    yield Unit(("image", "modulation"), ("branch",), feed_forward, (mlp,), modules, flops, alive, (rows,))
    whole = SitePoint(path, "hidden", "image", rows, block, listed=False)
    yield Unit(("image", "branch", "modulation"), ("image",), gated(5), (whole,), alive=adds, shapes=(rows,))
