"""Compiles a request's patches into a `TextPlan`: which columns of which run are live and needed, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .plan import (
    ATTN,
    HIDDEN,
    MLP,
    Attending,
    Attention,
    Chunk,
    Entries,
    HeadPatches,
    HeadRows,
    Indices,
    LayerPlan,
    Mask,
    Rows,
    Stage,
    Suffixes,
    TextPlan,
    TextShape,
)

# Suffixes with gaps begin at a multiple of so many tokens: runs that have just joined are few for each first token, and
# attend together where they begin together.
_ALIGNED = 16


def compile_plan(
    shape: TextShape, runs: int, sets: Entries, adds: Entries, chunk_rows: int, device: torch.device
) -> TextPlan:
    """Compile the plan of all runs, its indices on ``device``.

    Args:
        shape: of the model and the request.
        runs: number of runs, ``N``.
        sets: overwrites, at most one for each (run, stage, head, token).
        adds: additions after them.
        chunk_rows: slots that a chunk may have; a chunk holds at least one run.
    """
    within = [entries.stage < 3 * shape.layers for entries in (sets, adds)]
    within = [w & (entries.token < shape.length) for w, entries in zip(within, (sets, adds), strict=True)]
    sets, adds = sets[within[0]], adds[within[1]]
    start = np.full(runs, shape.length)
    for entries in (sets[~sets.same], adds):
        np.minimum.at(start, entries.run, entries.token if shape.causal else np.zeros_like(entries.token))
    joined = np.full(runs, 3 * shape.layers)
    for entries in (sets[~sets.same], adds):
        np.minimum.at(joined, entries.run, entries.stage)
    order = np.lexsort((joined, start))
    idle, order = order[start[order] == shape.length], order[start[order] < shape.length]
    parts = _split(shape.length - start[order], chunk_rows)
    chunk, local = np.full(runs, -1), np.zeros(runs, dtype=np.int64)
    for number, part in enumerate(parts):
        chunk[order[part]], local[order[part]] = number, np.arange(part.stop - part.start)
    own_sets, own_adds = (_by_chunk(entries, chunk, local, len(parts)) for entries in (sets, adds))
    chunks = [
        _ChunkCompiler(shape, start[order[part]], part_sets, part_adds, device).compile(order[part])
        for part, part_sets, part_adds in zip(parts, own_sets, own_adds, strict=True)
    ]
    return TextPlan(shape, chunks, torch.from_numpy(idle).to(device))


def _by_chunk(entries: Entries, chunk: Indices, local: Indices, chunks: int) -> list[Entries]:
    """Each chunk's entries, their runs numbered within it."""
    entries = entries[np.argsort(chunk[entries.run], kind="stable")]
    bounds = np.searchsorted(chunk[entries.run], np.arange(chunks + 1))
    own = [entries[np.arange(a, b)] for a, b in pairwise(bounds)]
    return [replace(each, run=local[each.run]) for each in own]


def _split(sizes: Indices, limit: int) -> list[slice]:
    """Consecutive slices whose sizes sum to at most ``limit``, or of one element."""
    ends = np.cumsum(sizes)
    slices, first = [], 0
    while first < len(sizes):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + limit, side="right")))
        slices.append(slice(first, last))
        first = last
    return slices


class _ChunkCompiler:
    """Masks ``[n, T]`` over the runs and tokens of a chunk, turned into indices."""

    def __init__(self, shape: TextShape, start: Indices, sets: Entries, adds: Entries, device: torch.device) -> None:
        self.shape, self.start, self.device = shape, start, device
        self.offset = np.concatenate(([0], np.cumsum(shape.length - start)))
        self.sets, self.adds = (self._by_stage(each[each.head < 0]) for each in (sets, adds))
        self.head_sets, self.head_adds = (self._by_stage(each[each.head >= 0])[ATTN::3] for each in (sets, adds))

    def _by_stage(self, entries: Entries) -> list[Entries]:
        entries = entries[np.argsort(entries.stage, kind="stable")]
        bounds = np.searchsorted(entries.stage, np.arange(3 * self.shape.layers + 1))
        return [entries[np.arange(a, b)] for a, b in pairwise(bounds)]

    def compile(self, members: Indices) -> Chunk:
        layers, needed = self.shape.layers, self._needed()
        live = np.zeros((len(members), self.shape.length), dtype=bool)
        plans = []
        for layer in range(layers):
            plan, live = self._layer(layer, live, needed[layer + 1])
            plans.append(plan)
        run, token = np.nonzero(live)
        target = self._tensor(run if self.shape.column is not None else run * self.shape.length + token)
        return Chunk(self._tensor(members), int(self.offset[-1]), plans, self._rows(live).slots, target)

    def _needed(self) -> list[Mask]:
        """For each layer's input, and the last one's output, the columns on which the result depends."""
        need = np.zeros((len(self.start), self.shape.length), dtype=bool)
        need[:, slice(None) if self.shape.column is None else self.shape.column] = True
        needed = [need]
        for layer in reversed(range(self.shape.layers)):
            inner = need & ~self._mask(self.sets[3 * layer + HIDDEN])
            queries = inner & ~self._mask(self.sets[3 * layer + ATTN])
            need = inner | (_up_to_last(queries) if self.shape.causal else queries.any(axis=1, keepdims=True))
            needed.insert(0, need)
        return needed

    def _layer(self, layer: int, live: Mask, needed: Mask) -> tuple[LayerPlan, Mask]:
        attn, mlp, hidden = (self.sets[3 * layer + stage] for stage in (ATTN, MLP, HIDDEN))
        # What is overwritten at the layer's output is needed at none of its inner sites.
        inner = needed & ~self._mask(hidden)

        reached = _from_first(live) if self.shape.causal else np.repeat(live.any(1, keepdims=True), live.shape[1], 1)
        reached &= inner
        free = inner & ~self._mask(attn)
        attended = reached & free
        head_sets, head_adds = self.head_sets[layer], self.head_adds[layer]
        headed = free & (self._mask(head_sets[~head_sets.same]) | self._mask(head_adds))
        attention, columns = self._attention(live, attended)
        columns = np.concatenate([columns, np.nonzero(headed & ~attended)], axis=1)
        heads = self._heads(columns, int(attended.sum()), head_sets, head_adds)
        stage_attn, live = self._stage(3 * layer + ATTN, live, reached | headed, attended | headed, inner)
        stage_attn = replace(stage_attn, computed=self._tensor(self._slots(*columns)))
        stage_mlp, live = self._stage(3 * layer + MLP, live, live, live & ~self._mask(mlp), inner)
        nothing = np.zeros_like(live)
        stage_hidden, live = self._stage(3 * layer + HIDDEN, live, live, nothing, needed)
        return LayerPlan(attention, heads, (stage_attn, stage_mlp, stage_hidden)), live

    def _stage(self, index: int, live: Mask, reached: Mask, computed: Mask, allowed: Mask) -> tuple[Stage, Mask]:
        """One site: ``reached`` columns are live after it whether patched or not; the others only if a patch joins."""
        sets, adds = self.sets[index], self.adds[index]
        sets = sets[allowed[sets.run, sets.token] & (~sets.same | reached[sets.run, sets.token])]
        adds = adds[allowed[adds.run, adds.token]]
        set_mask, add_mask = self._mask(sets), self._mask(adds)
        after = reached | set_mask | add_mask
        join, based = after & ~live, add_mask & ~computed & ~set_mask
        if index % 3 == HIDDEN:
            # A hidden state is overwritten, not added to a residual; what joins already is the base run's.
            join, based = join & ~set_mask, np.zeros_like(based)
        stage = Stage(
            self._rows(join),
            self._rows(computed).slots,
            self._rows(based),
            self._by_source(sets),
            self._by_source(adds),
        )
        return stage, after

    def _heads(self, columns: Indices, attended: int, sets: Entries, adds: Entries) -> HeadPatches | None:
        """``columns`` are the runs and tokens ``[2, n]`` whose result is projected, ``attended`` of them attended."""
        number = np.full((len(self.start), self.shape.length), -1)
        number[columns[0], columns[1]] = np.arange(columns.shape[1])
        sets, adds = (each[number[each.run, each.token] >= 0] for each in (sets, adds))
        if not len(sets.run) and not len(adds.run):
            return None
        return HeadPatches(
            self._tensor(columns[1, attended:]),
            self._by_source_and_head(sets, number),
            self._by_source_and_head(adds, number),
        )

    def _attention(self, live: Mask, computed: Mask) -> tuple[Attention | None, Indices]:
        """The attention, and the runs and tokens ``[2, n]`` of what it computes, in its order."""
        length = self.shape.length
        reading = np.flatnonzero(computed.any(axis=1))
        if not len(reading):
            return None, np.zeros((2, 0), dtype=np.int64)
        first = live[reading].argmax(axis=1) if self.shape.causal else np.zeros_like(reading)
        gapped = live[reading].sum(axis=1) < length - first
        first[gapped] -= first[gapped] % _ALIGNED
        order = np.lexsort((first, gapped))
        reading, first, gapped = reading[order], first[order], gapped[order]
        run, token = np.nonzero(live[reading])
        done, done_token = np.nonzero(computed[reading])
        offset = np.cumsum(length - first) - length
        place, chosen = offset[run] + token, offset[done] + done_token
        parts, before = [], 0
        for which in (~gapped, gapped):
            if which.any():
                suffixes = self._suffixes(first[which])
                own, count = which[run], len(suffixes.tokens)
                filled, kept = (self._unless_all(x - before, count) for x in (place[own], chosen[which[done]]))
                parts.append(Attending(suffixes, int(own.sum()), filled, kept))
                before += count
        rows = Rows(self._tensor(self._slots(reading[run], token)), self._tensor(token))
        return Attention(rows, parts), np.stack([reading[done], done_token])

    def _suffixes(self, first: Indices) -> Suffixes:
        """Of runs with ascending first tokens ``[n]``."""
        length = self.shape.length
        starts, counts = np.unique(first, return_counts=True)
        groups = list(zip(starts.tolist(), counts.tolist(), (length - starts).tolist(), strict=True))
        bounds = np.concatenate([[0], np.cumsum(length - first)]).astype(np.int32)
        tokens = np.nonzero(np.arange(length) >= first[:, None])[1]
        return Suffixes(groups, self._tensor(tokens), self._tensor(bounds))

    def _unless_all(self, rows: Indices, count: int) -> Tensor | None:
        return None if np.array_equal(rows, np.arange(count)) else self._tensor(rows)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _slots(self, run: Indices, token: Indices) -> Indices:
        return self.offset[run] + token - self.start[run]

    def _rows(self, mask: Mask) -> Rows:
        run, token = np.nonzero(mask)
        return Rows(self._tensor(self._slots(run, token)), self._tensor(token))

    def _by_source(self, entries: Entries) -> list[tuple[int, Rows]]:
        slots = self._slots(entries.run, entries.token)
        which = [(int(source), entries.source == source) for source in np.unique(entries.source)]
        return [(source, Rows(self._tensor(slots[w]), self._tensor(entries.token[w]))) for source, w in which]

    def _by_source_and_head(self, entries: Entries, number: Indices) -> list[tuple[int, HeadRows]]:
        columns = number[entries.run, entries.token], entries.token, entries.head
        which = [(int(source), entries.source == source) for source in np.unique(entries.source)]
        return [(source, HeadRows(*(self._tensor(column[w]) for column in columns))) for source, w in which]

    def _mask(self, entries: Entries) -> Mask:
        mask = np.zeros((len(self.start), self.shape.length), dtype=bool)
        mask[entries.run, entries.token] = True
        return mask


def _from_first(mask: Mask) -> Mask:
    """Columns from the first True of each row on."""
    return np.logical_or.accumulate(mask, axis=1)


def _up_to_last(mask: Mask) -> Mask:
    """Columns up to the last True of each row."""
    return np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
