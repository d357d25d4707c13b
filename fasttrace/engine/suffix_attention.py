"""Attention of packed runs: each run's last tokens, over the base run's keys and values and from there on its own.

Three ways to the same numbers. `Grouped`: torch's own attention, one call for the runs that start at the same token.
`Products`: the same groups as plain batched products, in which the base run's keys and values are not copied for each
run; in bfloat16 on a CPU this takes half the time. `Ragged`: one call for all runs of the op
``ragged_prefix_attention``, whose Triton kernel is compiled, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..ops.ragged_prefix_attention import ragged_prefix_attention
from .decoder import Decoder, Heads
from .text_plan import Suffixes

# In bfloat16 torch's softmax over rows takes twice as long where their length is no multiple of this.
_COLUMNS = 32
_BLOCK = 16
_TILE_ROWS = 512


class SuffixAttention(Protocol):
    """Writes attention's result ``[R, H, d]``, before the output projection, to ``out``.

    Called with queries ``[R, H, d]``, keys and values ``[R, G, d]`` of the suffixes; those of the base run,
    ``[T, ...]``; the suffixes; the factor on the scores.
    """

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None: ...


def suffix_attention(way: str | None, decoder: Decoder, like: Tensor) -> SuffixAttention:
    """Attention in one of the three ways, by default the one that is quickest for heads ``[R, H, d]`` like these."""
    return _WAYS[way or _quickest(decoder, like)](decoder, like)


def whole_attention(heads: Heads, bias: Tensor, scale: float) -> Tensor:
    """Queries ``[n, Q, H, d]`` over keys and values ``[n, T, G, d]``, bias ``[1 or H, Q, T]``: ``[n, Q, H x d]``."""
    q, k, v = (x.transpose(1, 2) for x in heads)
    # torch's fast CPU kernel takes masks of two or four dimensions.
    mask = bias[0] if len(bias) == 1 else bias[None]
    result = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return result.transpose(1, 2).flatten(2)


class Grouped:
    """One `scaled_dot_product_attention` for each first token."""

    def __init__(self, decoder: Decoder, like: Tensor) -> None:
        self.bias = decoder.bias

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None:
        for first, (q, *mine, result) in _groups(suffixes, (*own, out)):
            shared = (x[:first].expand(len(q), -1, -1, -1) for x in base[1:])
            k, v = (torch.cat(parts, dim=1) for parts in zip(shared, mine, strict=True))
            result.copy_(whole_attention((q, k, v), self.bias[:, first:], scale).view_as(result))


class Products:
    """Scores over the shared keys in one product a head, those over its own keys in one a run and head.

    oneDNN takes half a millisecond for every shape that it has not met lately, so sizes are rounded up to whole blocks
    and runs are taken in tiles of a few sizes.
    """

    def __init__(self, decoder: Decoder, like: Tensor) -> None:
        bias, length = decoder.bias, decoder.bias.shape[-1]
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=like.dtype).masked_fill_(~bias, float("-inf"))
        columns = _up(length + _BLOCK - 1, _COLUMNS)
        self.bias = pad(bias.to(like), (0, columns - length), value=float("-inf"))
        blind = self.bias.isneginf().all(dim=-1, keepdim=True)
        self.bias, blind = (pad(x, (0, 0, 0, _BLOCK)) for x in (self.bias, blind))
        self.blind = blind if bool(blind.any()) else None

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None:
        own, (_, k_base, v_base) = _every_head(own), _every_head(base)
        keys, values = k_base.permute(1, 2, 0).contiguous(), v_base.transpose(0, 1).contiguous()  # [H, d, T], [H, T, d]
        for first, rows in _groups(suffixes, (*own, out)):
            prefix = min(_up(first, _BLOCK), values.shape[1])
            # Columns from the first on are for the runs' own keys: what is shared there must count for nothing.
            shared = keys[..., :prefix].clone(), values[:, :prefix].clone()
            shared[0][..., first:] = 0
            shared[1][:, first:] = 0
            for runs in _tiles(*rows[0].shape[:2]):
                self._tile([x[runs] for x in rows], first, shared, scale)

    def _tile(self, tile: list[Tensor], first: int, shared: tuple[Tensor, Tensor], scale: float) -> None:
        """Some runs of one group: their q, k, v and result ``[n, Q, H, d]``."""
        result = tile[-1].permute(2, 0, 1, 3)
        heads, runs, span, _ = result.shape
        # Heads before runs: then all runs' queries of a head are one matrix, and so are each run's.
        q, k, v = (_in_blocks(x.permute(2, 0, 1, 3)) for x in tile[:-1])
        rows, (keys, values) = q.shape[2], shared
        bias = self.bias[:, None, first : first + rows]
        scores = q.new_empty(heads, runs, rows, bias.shape[-1]).copy_(bias)
        before = scores.flatten(1, 2)[..., : keys.shape[-1]]
        mine = scores.flatten(0, 1)[..., first : first + rows]
        if first:
            torch.baddbmm(before, q.flatten(1, 2), keys, alpha=scale, out=before)
        torch.baddbmm(mine, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale, out=mine)
        torch.softmax(scores, dim=-1, out=scores)
        if self.blind is not None:
            scores.masked_fill_(self.blind[:, None, first : first + rows], 0.0)
        summed = torch.bmm(mine, v.flatten(0, 1)).view_as(q)
        if first:
            flat = summed.flatten(1, 2)
            torch.baddbmm(flat, before, values, out=flat)
        result.copy_(summed[:, :, :span])


class Ragged:
    """One call of the op for all suffixes."""

    def __init__(self, decoder: Decoder, like: Tensor) -> None:
        # The last token of a causal model reads every key that may be read at all.
        readable = decoder.bias[:, -1]
        self.key_mask = None if bool(readable.all()) else readable

    def __call__(self, own: Heads, base: Heads, suffixes: Suffixes, scale: float, out: Tensor) -> None:
        own, (_, k_base, v_base) = _every_head(own), _every_head(base)
        key_mask = self.key_mask
        out.copy_(ragged_prefix_attention(*own, k_base[None], v_base[None], suffixes.bounds, None, key_mask, scale))


_WAYS: dict[str, Callable[[Decoder, Tensor], SuffixAttention]] = {
    "grouped": Grouped,
    "products": Products,
    "ragged": Ragged,
}


def _quickest(decoder: Decoder, like: Tensor) -> str:
    if decoder.causal and ragged_prefix_attention.chosen(like) == "triton":
        return "ragged"
    return "products" if like.device.type == "cpu" and like.dtype == torch.bfloat16 else "grouped"


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


def _tiles(runs: int, span: int) -> Iterator[slice]:
    """Runs in tiles of one size; the last overlaps the one before it, rather than have a size of its own."""
    count = -(-runs * span // _TILE_ROWS)
    size = -(-runs // min(count, runs))
    for start in range(0, runs, size):
        stop = min(start + size, runs)
        yield slice(stop - size, stop)


def _in_blocks(x: Tensor) -> Tensor:
    """``[H, n, Q, d]`` in memory of its own, zero up to a whole number of blocks in ``Q``."""
    span = x.shape[2]
    result = x.new_empty(*x.shape[:2], _up(span, _BLOCK), x.shape[3])
    result[:, :, :span] = x
    result[:, :, span:] = 0
    return result


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
