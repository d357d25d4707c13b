"""A block with two streams, image and text, that attend to each other in one softmax: SD3's, and FLUX's double blocks.

The two differ in how heads are made, which is given. SD3.5-medium has a second attention ``attn2`` in its first blocks,
of the image alone, beside the joint one: it reads what entered the block (value ``second``). In SD3's last block only
the image stream goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .attention import attend as softmax_attention
from .transformer import (
    Count,
    attention_flops,
    both,
    heads_of,
    merged,
    modulated,
    modulation,
    per_position,
    projected,
    rows_of,
    text_tokens,
    total,
)
from .unit import Forward, SitePoint, Unit

Attend: TypeAlias = Callable[[Forward, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def joint_block(path: str, block: Any, width: int, image: Count, attend: Attend, holds: bool = False) -> Iterator[Unit]:
    """The units of one block.

    Args:
        path: of the block, in the model.
        attend: from both streams and their modulations to both streams' heads, and what enters the second attention.
        holds: whether half-precision text is held within that type's range.
    """
    goes_on, second_attn = not getattr(block, "context_pre_only", False), getattr(block, "attn2", None)
    dual = second_attn is not None
    yield modulation(f"{path}.norm1", block.norm1, "modulation")
    yield modulation(f"{path}.norm1_context", block.norm1_context, "text_modulation")
    reads = ("image", "text", "modulation", "text_modulation")
    attn = block.attn
    weights = [
        (image, attn.to_q, attn.to_k, attn.to_v),
        (text_tokens, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
    ]
    flops = total(*(per_position(*one) for one in weights), attention_flops(both(image), width))
    writes = ("heads", "text_heads", *(("second",) if dual else ()))
    second = (rows_of(image, width),) if dual else ()
    shapes = (rows_of(image, width), rows_of(text_tokens, width), *second)
    yield Unit(reads, writes, attend, (), (), flops, shapes=shapes)
    yield from _project(path, attn, width, image, goes_on)
    yield Unit(("image", "branch", "modulation"), ("image",), _add(2))
    if dual:
        yield from _second(path, second_attn, width, image)
        yield Unit(("image", "branch", "modulation"), ("image",), _add(8))
    ff = SitePoint(f"{path}.ff", "mlp", "branch", rows_of(image, width), block.ff)
    run = _feed_forward(block.norm2, block.ff)
    yield Unit(("image", "modulation"), ("branch",), run, (ff,), (block.norm2, block.ff), per_position(image, block.ff))
    whole = SitePoint(
        f"{path}.image", "hidden", "image", rows_of(image, width), block, stream="image", output=1, listed=False
    )
    if not goes_on:
        yield Unit(("image", "branch", "modulation"), ("image",), _add(5), (whole,))
        return
    yield Unit(("text", "text_branch", "text_modulation"), ("text",), _add(2))
    ff = SitePoint(f"{path}.ff_context", "mlp", "text_branch", rows_of(text_tokens, width), block.ff_context)
    run, modules = _feed_forward(block.norm2_context, block.ff_context), (block.norm2_context, block.ff_context)
    flops = per_position(text_tokens, block.ff_context)
    yield Unit(("text", "text_modulation"), ("text_branch",), run, (ff,), modules, flops)
    text = SitePoint(f"{path}.text", "hidden", "text", rows_of(text_tokens, width), block, stream="text", listed=False)
    yield _end_of_block((whole, text), holds)


def _end_of_block(sites: tuple[SitePoint, ...], holds: bool) -> Unit:
    """Both streams take up their MLPs' outputs."""
    add = _add(5)
    reads = ("image", "branch", "modulation", "text", "text_branch", "text_modulation")

    def run(forward: Forward, *values: Tensor) -> tuple[Tensor, Tensor]:
        text = add(forward, *values[3:])
        return add(forward, *values[:3]), in_range(text) if holds else text

    return Unit(reads, ("image", "text"), run, sites)


def _project(path: str, attn: Any, width: int, image: Count, goes_on: bool) -> Iterator[Unit]:
    to_out = attn.to_out
    heads = heads_of(attn, "heads", to_out[0])
    point = SitePoint(
        f"{path}.attn.image", "joint_attn", "branch", rows_of(image, width), attn, stream="image", heads=heads
    )
    if not goes_on:
        flops = per_position(image, to_out)
        yield Unit(("heads",), ("branch",), lambda _, x: to_out[1](to_out[0](x)), (point,), tuple(to_out), flops)
        return
    shape = rows_of(text_tokens, width)
    heads = heads_of(attn, "text_heads", attn.to_add_out)
    text = SitePoint(
        f"{path}.attn.text", "joint_attn", "text_branch", shape, attn, stream="text", output=1, heads=heads
    )

    def run(_: Forward, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return to_out[1](to_out[0](x)), attn.to_add_out(c)

    flops = total(per_position(image, to_out), per_position(text_tokens, attn.to_add_out))
    writes, modules = ("branch", "text_branch"), (*to_out, attn.to_add_out)
    yield Unit(
        ("heads", "text_heads"), writes, run, (point, text), modules, flops, shapes=(rows_of(image, width), shape)
    )


def _second(path: str, attn: Any, width: int, image: Count) -> Iterator[Unit]:
    """The image's attention to itself alone, beside the joint one."""
    heads, to_out = attn.heads, attn.to_out

    def run(_: Forward, x: Tensor) -> Tensor:
        query = projected(x, attn.to_q, attn.norm_q, heads)
        key = projected(x, attn.to_k, attn.norm_k, heads)
        return merged(softmax_attention(query, key, projected(x, attn.to_v, None, heads)))

    flops = total(per_position(image, attn.to_q, attn.to_k, attn.to_v), attention_flops(image, width))
    yield Unit(("second",), ("heads",), run, (), (), flops)
    point = SitePoint(
        f"{path}.attn2", "self_attn", "branch", rows_of(image, width), attn, heads=heads_of(attn, "heads", to_out[0])
    )
    flops = per_position(image, to_out)
    yield Unit(("heads",), ("branch",), lambda _, x: to_out[1](to_out[0](x)), (point,), tuple(to_out), flops)


def _feed_forward(norm: Any, feed_forward: Any) -> Callable[[Forward, Tensor, Tensor], Tensor]:
    def run(_: Forward, x: Tensor, mod: Tensor) -> Tensor:
        width = x.shape[-1]
        y: Tensor = feed_forward(modulated(norm, x, mod[..., 3 * width : 4 * width], mod[..., 4 * width : 5 * width]))
        return y

    return run


def _add(gate: int) -> Callable[[Forward, Tensor, Tensor, Tensor], Tensor]:
    """A branch is added through a gate, which is some part of the modulation."""

    def run(_: Forward, x: Tensor, branch: Tensor, mod: Tensor) -> Tensor:
        width = x.shape[-1]
        return x + mod[..., gate * width : (gate + 1) * width] * branch

    return run


def in_range(x: Tensor) -> Tensor:
    """Half-precision states held within that type's range, as FLUX does."""
    limit = torch.finfo(torch.float16).max
    return x.clip(-limit, limit) if x.dtype == torch.float16 else x
