"""Attention of packed runs: each run's last tokens, over the base run's keys and values and from there on its own.

Two ways to the same numbers. `Grouped`: torch's own attention, one call for the runs that start at the same token.
`Ragged`: one call for all runs of the op ``ragged_prefix_attention``, whose Triton kernel is compiled, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ...models.text.description import Heads, attended
from ...ops.ragged_prefix_attention import ragged_prefix_attention
from .plan import Suffixes


class SuffixAttention(Protocol):
    """Writes attention's result ``[R, H, d]``, before the output projection, to ``out``.

    Called with queries ``[R, H, d]``, keys and values ``[R, G, d]`` of the suffixes; those of the base run,
    ``[T, ...]``; the suffixes; the factor on the scores.
    """

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None: ...


def suffix_attention(way: str | None, bias: Tensor, causal: bool, like: Tensor) -> SuffixAttention:
    """Attention in one of the two ways, by default the one that is quickest for heads ``[R, H, d]`` like these.

    Args:
        way: ``"grouped"``, ``"ragged"`` or ``None``.
        bias: of the model, ``[1 or H, T, T]``; ``causal`` says that it hides what follows a token.
    """
    if way is None:
        way = "ragged" if causal and ragged_prefix_attention.chosen(like) == "triton" else "grouped"
    return _WAYS[way](bias)


class Grouped:
    """One `scaled_dot_product_attention` for each first token."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None:
        for first, (q, *mine, result) in _groups(suffixes, (*own, out)):
            shared = (x[:first].expand(len(q), -1, -1, -1) for x in base[1:])
            k, v = (torch.cat(parts, dim=1) for parts in zip(shared, mine, strict=True))
            result.copy_(attended((q, k, v), self.bias[:, first:], scale).view_as(result))


class Ragged:
    """One call of the op for all suffixes."""

    def __init__(self, bias: Tensor) -> None:
        # The last token of a causal model reads every key that may be read at all.
        readable = bias[:, -1]
        self.key_mask = None if bool(readable.all()) else readable

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None:
        own, (_, k_base, v_base) = _every_head(own), _every_head(base)
        key_mask = self.key_mask
        out.copy_(ragged_prefix_attention(*own, k_base[None], v_base[None], suffixes.bounds, None, key_mask, scale))


_WAYS: dict[str, Callable[[Tensor], SuffixAttention]] = {"grouped": Grouped, "ragged": Ragged}


def _groups(suffixes: Suffixes, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, list[Tensor]]]:
    """Each group's first token, and its rows ``[n, Q, ...]`` of tensors ``[R, ...]``; views."""
    sizes = [count * span for _, count, span in suffixes.groups]
    parts = zip(*(torch.split(x, sizes) for x in tensors), strict=True)
    for (first, count, span), rows in zip(suffixes.groups, parts, strict=True):
        yield first, [x.unflatten(0, (count, span)) for x in rows]


def _every_head(heads: Heads) -> Heads:
    """Keys and values repeated where several heads of queries share them."""
    q, k, v = heads
    if q.shape[1] == k.shape[1]:
        return heads
    times = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
