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
    held,
    merged,
    modulated,
    modulation,
    per_position,
    projected,
    projection,
    rows_of,
    text_tokens,
    total,
    widest_of,
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
    # What enters after its norm; queries, keys and values; what comes out.
    alive = held(both(image), 5 * width)
    yield Unit(reads, writes, attend, (), (), flops, alive, shapes)
    yield from _project(path, attn, width, image, goes_on)
    yield _added("image", "branch", 2, width, image)
    if dual:
        yield from _second(path, second_attn, width, image)
        yield _added("image", "branch", 8, width, image)
    yield _mlp(f"{path}.ff", ("image", "modulation"), "branch", block.norm2, block.ff, width, image)
    whole = SitePoint(
        f"{path}.image", "hidden", "image", rows_of(image, width), block, stream="image", output=1, listed=False
    )
    if not goes_on:
        yield _added("image", "branch", 5, width, image, (whole,))
        return
    yield _added("text", "text_branch", 2, width, text_tokens)
    read, norm = ("text", "text_modulation"), block.norm2_context
    yield _mlp(f"{path}.ff_context", read, "text_branch", norm, block.ff_context, width, text_tokens)
    text = SitePoint(f"{path}.text", "hidden", "text", rows_of(text_tokens, width), block, stream="text", listed=False)
    yield _end_of_block((whole, text), holds, width, image)


def _mlp(
    path: str, reads: tuple[str, str], writes: str, norm: Any, feed_forward: Any, width: int, count: Count
) -> Unit:
    shape, run = rows_of(count, width), _feed_forward(norm, feed_forward)
    point = SitePoint(path, "mlp", writes, shape, feed_forward)
    flops, alive = per_position(count, feed_forward), held(count, widest_of(feed_forward))
    return Unit(reads, (writes,), run, (point,), (norm, feed_forward), flops, alive, (shape,))


def _added(stream: str, branch: str, gate: int, width: int, count: Count, sites: tuple[SitePoint, ...] = ()) -> Unit:
    """A stream takes up a branch."""
    modulation = "modulation" if stream == "image" else "text_modulation"
    alive, shapes = held(count, 3 * width), (rows_of(count, width),)
    return Unit((stream, branch, modulation), (stream,), _add(gate), sites, alive=alive, shapes=shapes)


def _end_of_block(sites: tuple[SitePoint, ...], holds: bool, width: int, image: Count) -> Unit:
    """Both streams take up their MLPs' outputs."""
    add = _add(5)
    reads = ("image", "branch", "modulation", "text", "text_branch", "text_modulation")

    def run(forward: Forward, *values: Tensor) -> tuple[Tensor, Tensor]:
        text = add(forward, *values[3:])
        return add(forward, *values[:3]), in_range(text) if holds else text

    shapes = rows_of(image, width), rows_of(text_tokens, width)
    return Unit(reads, ("image", "text"), run, sites, alive=held(both(image), 3 * width), shapes=shapes)


def _project(path: str, attn: Any, width: int, image: Count, goes_on: bool) -> Iterator[Unit]:
    to_out = attn.to_out
    heads = heads_of(attn, "heads", to_out[0])
    point = SitePoint(
        f"{path}.attn.image", "joint_attn", "branch", rows_of(image, width), attn, stream="image", heads=heads
    )
    if not goes_on:
        yield projection(point, to_out, width, image)
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
    alive, shapes = held(both(image), width), (rows_of(image, width), shape)
    yield Unit(("heads", "text_heads"), writes, run, (point, text), modules, flops, alive, shapes)


def _second(path: str, attn: Any, width: int, image: Count) -> Iterator[Unit]:
    """The image's attention to itself alone, beside the joint one."""
    heads, to_out = attn.heads, attn.to_out

    def run(_: Forward, x: Tensor) -> Tensor:
        query = projected(x, attn.to_q, attn.norm_q, heads)
        key = projected(x, attn.to_k, attn.norm_k, heads)
        return merged(softmax_attention(query, key, projected(x, attn.to_v, None, heads)))

    flops = total(per_position(image, attn.to_q, attn.to_k, attn.to_v), attention_flops(image, width))
    yield Unit(("second",), ("heads",), run, (), (), flops, held(image, 5 * width), (rows_of(image, width),))
    point = SitePoint(
        f"{path}.attn2", "self_attn", "branch", rows_of(image, width), attn, heads=heads_of(attn, "heads", to_out[0])
    )
    yield projection(point, to_out, width, image)


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
