"""What diffusion transformers share: modulated norms, streams of positions, patches of an image.

Their values, whatever the model:

===================  ==================================================================================
``sample``           the latents, and at the end the model's output
``image``, ``text``  the two streams, ``[B, P, D]`` and ``[B, T, D]``
``temb``             timestep, guidance and pooled text of each row, ``[B, D]``
``modulation``       a block's shifts, scales and gates of the image stream, ``[B, 1, 6 D]``
``text_modulation``  the same of the text stream
``heads``            an attention's result before its output projection, of the image stream
``branch``           an attention's or MLP's output, before its gate; ``text_branch`` of the text stream
===================  ==================================================================================

Constants of a forward: ``text`` (``[B]``, each row's number among the conditions) and ``time`` (``[1 or B, D]``, from a
model's ``time_states``), and shared by all rows ``texts`` (``[K, T, D]``, every condition as the first block reads it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import has_hooks, split_heads
from .unit import Dims, Forward, Heads, Shape, SitePoint, Unit, weights_in

Count = Callable[[Dims], int]
"""Number of positions."""


def rows_of(count: Count, channels: int) -> Shape:
    """``(P, D)``."""
    return lambda dims: (count(dims), channels)


def patches(size: int) -> Count:
    """Number of patches of some width and height in the latents."""
    return lambda dims: (dims.height // size) * (dims.width // size)


def text_tokens(dims: Dims) -> int:
    return dims.tokens


def both(image: Count) -> Count:
    """Tokens of the text and positions of the image."""
    return lambda dims: dims.tokens + image(dims)


def per_position(count: Count, *modules: nn.Module) -> Callable[[Dims], float]:
    """Operations of linear layers at every position."""
    weights = weights_in(*modules)
    return lambda dims: 2 * weights * count(dims)


def attention_flops(count: Count, width: int) -> Callable[[Dims], float]:
    """Operations of both products of an attention of some positions to each other."""
    return lambda dims: 4 * count(dims) ** 2 * width


def total(*parts: Callable[[Dims], float]) -> Callable[[Dims], float]:
    return lambda dims: sum(part(dims) for part in parts)


def held(count: Count, numbers: int) -> Count:
    """So many numbers at every position, alive at once."""
    return lambda dims: numbers * count(dims)


def widest_of(feed_forward: Any) -> int:
    """Numbers at a position within an MLP: what enters, and the hidden layer before and after its activation."""
    first, last = feed_forward.net[0].proj.weight, feed_forward.net[2].weight
    return int(first.shape[1] + first.shape[0] + last.shape[1])


def modulation(path: str, norm: Any, value: str) -> Unit:
    """Shifts, scales and gates of an adaptive norm, all in one ``[B, 1, n D]``."""
    width = norm.linear.weight.shape[0]
    point = SitePoint(f"{path}.modulation", "modulation", value, lambda dims: (1, width), norm.linear, listed=False)
    flops = 2.0 * norm.linear.weight.numel()

    def run(_: Forward, temb: Tensor) -> Tensor:
        made: Tensor = norm.linear(norm.silu(temb))
        return made.unsqueeze(1)

    return Unit(("temb",), (value,), run, (point,), (norm.linear,), lambda dims: flops)


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A norm without weights of its own, scaled and shifted by ``[B, 1, D]``."""
    y: Tensor = norm(x) * (1 + scale) + shift
    return y


def begin_temb() -> Unit:
    def run(forward: Forward) -> Tensor:
        return forward.of_rows("time").expand(forward.rows, -1)

    return Unit((), ("temb",), run)


def begin_text(width: int) -> Unit:
    def run(forward: Forward) -> Tensor:
        texts: Tensor = forward.shared["texts"]
        return texts[forward.of_rows("text").expand(forward.rows)]

    return Unit((), ("text",), run, shapes=(lambda dims: (dims.tokens, width),))


def final_modulation(norm: Any) -> Unit:
    return modulation("norm_out", norm, "modulation")


def finish(model: Any, norm: Any, count: Count, unpack: Callable[[Forward, Tensor], Tensor]) -> Unit:
    """The last norm and projection, and the patches laid out as latents."""

    def run(forward: Forward, image: Tensor, final: Tensor) -> Tensor:
        scale, shift = final.chunk(2, dim=-1)
        return unpack(forward, model.proj_out(modulated(norm.norm, image, shift, scale)))

    flops = per_position(count, model.proj_out)
    return Unit(("image", "modulation"), ("sample",), run, (), (norm.norm, model.proj_out), flops)


def unpatched(forward: Forward, x: Tensor, size: int, channels: int) -> Tensor:
    """Patches ``[B, P, size size C]`` as latents ``[B, C, h, w]``."""
    height, width = forward.dims.height // size, forward.dims.width // size
    x = x.reshape(x.shape[0], height, width, size, size, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], channels, height * size, width * size)


def projected(x: Tensor, linear: nn.Module, norm: Any, heads: int) -> Tensor:
    """Queries or keys ``[B, H, P, d]``, normalised where the model does that."""
    split = split_heads(linear(x), heads)
    if norm is None:
        return split
    normed: Tensor = norm(split)
    return normed


def heads_of(attention: Any, value: str, projection: Any) -> Heads:
    """Heads beside each other in a value, which is what the projection reads."""
    return Heads(value, attention.heads, attention.to_q.weight.shape[0] // attention.heads, projection)


def projection(point: SitePoint, to_out: Any, width: int, count: Count) -> Unit:
    """An attention's output projection."""
    modules, flops, alive = tuple(to_out), per_position(count, to_out), held(count, width)
    shapes = (rows_of(count, width),)
    return Unit(("heads",), ("branch",), lambda _, x: to_out[1](to_out[0](x)), (point,), modules, flops, alive, shapes)


def merged(heads: Tensor) -> Tensor:
    """``[B, H, P, d]`` as ``[B, P, H d]``."""
    return heads.transpose(1, 2).flatten(2)


def is_bare(*modules: Any) -> bool:
    """Whether no module carries a hook; for modules whose forward the units bypass."""
    hooks = torch.nn.modules.module
    return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks) and not any(map(has_hooks, modules))
