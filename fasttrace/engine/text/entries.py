"""The patches of a text trace as arrays, and what each of their sources is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...corruption import philox_normal
from ...patch import ZERO, Add, Noise, Patch, Source
from ...sites import Site
from ..requests.text import TextRequest, encoder_path
from ..values import given_value
from .plan import KIND_STAGE, Entries, Indices


@dataclass(frozen=True)
class FlatPatches:
    """Every (run, stage, head, token) that a patch names, in the order in which patches apply.

    ``head`` is -1 for a whole site. ``source`` indexes ``sources``: the distinct sources of the request. ``adds`` marks
    those that add to what was computed.
    """

    run: Indices
    stage: Indices
    head: Indices
    token: Indices
    source: Indices
    sources: list[Patch]
    adds: Indices

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal for patch lists that compile to the same plan."""
        return tuple(a.tobytes() for a in (self.run, self.stage, self.head, self.token, self.source, self.adds))


def flatten(request: TextRequest) -> FlatPatches:
    """Patches as arrays; a position that one patch names twice counts once."""
    length = request.ids.shape[0]
    stages = {path: (3 * site.layer + KIND_STAGE[site.kind], _head(site)) for path, site in request.sites.items()}
    everywhere = tuple(range(length))
    numbers: dict[object, int] = {}
    sources: list[Patch] = []
    table_rows: list[tuple[int, int, int, int, int]] = []
    tokens: list[int] = []
    for number, patches in enumerate(request.runs):
        for patch in patches:
            if patch.is_empty:
                continue
            key = _identity(patch.source)
            if key not in numbers:
                numbers[key] = len(sources)
                sources.append(patch)
            assert not isinstance(patch.positions, str)
            where = everywhere if patch.positions is None else tuple(dict.fromkeys(patch.positions))
            table_rows.append((number, *stages[encoder_path(patch.site)], numbers[key], len(where)))
            tokens.extend(where)
    table = np.array(table_rows, dtype=np.int64).reshape(-1, 5)
    run, stage, heads, source = (np.repeat(table[:, column], table[:, 4]) for column in range(4))
    adds = np.array([isinstance(patch.source, Add | Noise) for patch in sources], dtype=np.int64)
    return FlatPatches(run, stage, heads, np.array(tokens, dtype=np.int64), source, sources, adds)


def _head(site: Site) -> int:
    """Number of a head in its attention, -1 for a whole site."""
    return -1 if site.channels is None else site.channels.start // (site.channels.stop - site.channels.start)


def _identity(source: Source) -> object:
    if isinstance(source, str | Noise):
        return source
    return id(source.value if isinstance(source, Add) else source), isinstance(source, Add)


def split_entries(flat: FlatPatches, differs_from: Indices, length: int) -> tuple[Entries, Entries]:
    """The overwrite that counts at each (run, stage, head, token), which is the last, and the additions after it.

    Args:
        flat: the patches.
        differs_from: for each source, the first token at which it may differ from the base run.
        length: number of tokens.
    """
    cell = flat.run * (flat.stage.max(initial=0) + 1) + flat.stage
    cell = (cell * (flat.head.max(initial=0) + 2) + flat.head + 1) * length + flat.token
    adding = flat.adds.astype(bool)[flat.source]
    every = Entries(flat.run, flat.stage, flat.head, flat.token, flat.source, flat.token < differs_from[flat.source])
    where = np.flatnonzero(~adding)
    cells, from_end = np.unique(cell[where][::-1], return_index=True)
    last = where[::-1][from_end]
    position = np.searchsorted(cells, cell)
    found = position < len(cells)
    found[found] = cells[position[found]] == cell[found]
    after = np.full(len(cell), -1)
    after[found] = last[position[found]]
    keep = adding & (np.arange(len(cell)) > after)
    return every[np.sort(last)], every[keep]


def differs_from(request: TextRequest, sources: list[Patch]) -> Indices:
    """For each source, the first token at which its values may differ from the base run's, ``T`` if none.

    In a causal model nothing before the first token whose input differs can differ.
    """
    length = request.ids.shape[0]
    noisy = request.noise.ne(0).any(dim=-1).any(dim=0)

    def first(differing: Tensor) -> int:
        where = torch.nonzero(differing)
        return int(where[0]) if len(where) else length

    def of(source: Source) -> int:
        if not isinstance(source, str):
            return 0
        if source == request.base:
            return length
        if source in ("clean", "corrupted"):
            return first(noisy)
        other = request.sources[source] != request.ids
        return first(other | noisy if request.base == "corrupted" else other)

    return np.array([of(patch.source) for patch in sources], dtype=np.int64)


def given_rows(patch: Patch, tokens: Tensor, length: int, like: Tensor) -> Tensor:
    """Values ``[n, D]`` of a source that is no run, at some tokens.

    Args:
        like: a tensor of the model's width, dtype and device.
    """
    source, width = patch.source, like.shape[-1]
    if source is ZERO:
        return like.new_zeros(len(tokens), width)
    if isinstance(source, Noise):
        return (source.sigma * philox_normal(source.seed, 0, tokens.cpu(), width)).to(like)
    value = source.value if isinstance(source, Add) else source
    assert isinstance(value, Tensor)
    return given_value(patch, value, length, width, None)[tokens.to(value.device)].to(like)
