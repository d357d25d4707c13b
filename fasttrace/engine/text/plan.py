"""The compiled plan of a packed text pass: which token of which run is computed where. Plain numpy, no model.

A run exists at the columns (tokens) where its hidden state may differ from the base run's: its *live* columns. A patch
makes its own column live at its site; the next attention makes live what may read it, in a causal model the columns
from the first live one on. Backwards, a column is *needed* if anything that is returned depends on it. What is computed
is live and needed; everything else is read from the base run.

Live columns of a run have *slots*, rows of one packed state that the whole chunk of runs shares. A plan depends on
the model's shape and on the patches, not on the prompt or the noise, and is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

ATTN, MLP, HIDDEN = 0, 1, 2
KIND_STAGE = {"self_attn": ATTN, "head": ATTN, "mlp": MLP, "hidden": HIDDEN}


@dataclass(frozen=True)
class TextShape:
    """What a plan needs to know of the model and of the request.

    Attributes:
        layers: number of layers that run.
        length: number of tokens that run, ``T``.
        causal: whether a token reads only itself and the tokens before it.
        column: the only one of these tokens that is returned, or ``None`` for all.
    """

    layers: int
    length: int
    causal: bool
    column: int | None


@dataclass(frozen=True)
class Entries:
    """Overwrites or additions, one for each (run, stage, head, token). ``stage`` is 3 x layer + ATTN, MLP or HIDDEN.

    ``head`` is -1 for a whole site. ``source`` indexes the request's sources; ``same`` says that the source's value
    there is the base run's own.
    """

    run: Indices
    stage: Indices
    head: Indices
    token: Indices
    source: Indices
    same: Mask

    def __getitem__(self, which: Indices | Mask) -> Entries:
        return Entries(*(getattr(self, column.name)[which] for column in fields(self)))


@dataclass(frozen=True)
class Rows:
    """Slots of the packed state ``[n]``, and the tokens that they hold ``[n]``."""

    slots: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Stage:
    """What happens at one site of one layer.

    Attributes:
        join: enter the packed state with the base run's hidden state.
        computed: slots that receive what the module computed, in its order.
        based: receive the base run's value at the site.
        sets: receive a source's value, by source.
        adds: have a source's value added, by source.
    """

    join: Rows
    computed: Tensor
    based: Rows
    sets: list[tuple[int, Rows]]
    adds: list[tuple[int, Rows]]


@dataclass(frozen=True)
class Suffixes:
    """The last tokens of some runs, put end to end in the order of their first token: ``R`` in all.

    Attributes:
        groups: (first token, number of runs, tokens of each), by first token.
        tokens: ``[R]``.
        bounds: where each run begins, and the end: int32 ``[n + 1]``.
    """

    groups: list[tuple[int, int, int]]
    tokens: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Attending:
    """Some runs of an attention, and which inputs they have of their own.

    Attributes:
        suffixes: tokens from which they query, and whose keys are not simply the base run's.
        live: number of inputs that are live.
        filled: where these stand among the suffixes, the base run's query, key and value between them; ``None`` if
            they are all.
        chosen: which suffix tokens are computed further; ``None`` for all.
    """

    suffixes: Suffixes
    live: int
    filled: Tensor | None
    chosen: Tensor | None

    @property
    def queries(self) -> int:
        """Number of suffix tokens that are computed further."""
        return len(self.suffixes.tokens if self.chosen is None else self.chosen)


@dataclass(frozen=True)
class Attention:
    """One layer's attention: of the runs that are live from some token to the last, and of the others (just joined).

    Attributes:
        rows: the live inputs, part by part.
        parts: of the runs.
    """

    rows: Rows
    parts: list[Attending]


@dataclass(frozen=True)
class HeadRows:
    """Some rows ``[n]`` of an attention's result, the tokens that they hold ``[n]``, and a head in each ``[n]``."""

    rows: Tensor
    tokens: Tensor
    heads: Tensor


@dataclass(frozen=True)
class HeadPatches:
    """Patches of single heads: they change an attention's result before its output projection.

    Attributes:
        based: tokens of runs that join for their patches: they start from the base run's result, after what was
            attended.
        sets: heads that receive a source's value, by source.
        adds: heads that have a source's value added, by source.
    """

    based: Tensor
    sets: list[tuple[int, HeadRows]]
    adds: list[tuple[int, HeadRows]]


@dataclass(frozen=True)
class LayerPlan:
    attention: Attention | None
    heads: HeadPatches | None
    stages: tuple[Stage, Stage, Stage]


@dataclass(frozen=True)
class Chunk:
    """Runs that pass through the model together.

    Attributes:
        runs: their numbers ``[n]``.
        slots: number of rows of the packed state.
        layers: one plan a layer.
        final: slots that are returned.
        target: where they go among ``n x T`` (``n`` if only one token is returned).
    """

    runs: Tensor
    slots: int
    layers: list[LayerPlan]
    final: Tensor
    target: Tensor


@dataclass(frozen=True)
class TextPlan:
    """Chunks of runs, and the ``idle`` runs ``[n]`` that equal their base run."""

    shape: TextShape
    chunks: list[Chunk] = field(repr=False)
    idle: Tensor

    @property
    def token_layers(self) -> int:
        """Tokens that pass through an MLP, summed over layers."""
        return sum(len(layer.stages[MLP].computed) for chunk in self.chunks for layer in chunk.layers)

    def flops(self, width: int, inner: int) -> int:
        """Floating-point operations of the packed pass: projections, attention and an ungated MLP, no base runs.

        Args:
            width: of the hidden state and of all heads together.
            inner: of the MLP.
        """
        total = 4 * width * inner * self.token_layers
        for layer in (layer for chunk in self.chunks for layer in chunk.layers):
            total += 2 * width**2 * len(layer.stages[ATTN].computed)
            if (attention := layer.attention) is not None:
                readable = sum(self._readable(part) for part in attention.parts)
                total += 6 * width**2 * len(attention.rows.slots) + 4 * width * readable
        return total

    def _readable(self, part: Attending) -> int:
        """Keys that the computed queries read, in all."""
        if not self.shape.causal:
            return part.queries * self.shape.length
        tokens = part.suffixes.tokens
        return int((tokens if part.chosen is None else tokens[part.chosen]).sum()) + part.queries
