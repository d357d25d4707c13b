"""An architecture is a list of units, and everything else is derived from that list.

A unit is one stretch of a forward pass: it reads some named values, calls some modules, and writes some named values.
Here is the middle of a transformer block as three of them::

    Unit(("x",), ("heads",), attend)                                  # norm, queries, keys, values, softmax
    Unit(("heads",), ("branch",), project, sites=(attn1,))            # the site's value is what `project` wrote
    Unit(("x", "branch"), ("x",), add)                                # the residual

Why units and not the modules themselves? Because a patched run differs from its base run only from its site on, and a
run that joins the batch there must bring with it exactly what the rest of the forward still reads: here ``x`` and
``branch``, and every skip connection that the way up will take. That set is computed from ``reads`` and ``writes``
(`fasttrace.models.liveness`), so skips, residuals and second streams are no special cases, and an architecture that has
others is one more list. Order, shapes and costs of sites are read off the same list.

A description is made from a model's modules, the user's own or a shadow of them, on any device, ``meta`` included. It
runs nothing by itself and knows no engine.

Beware: names are reused (``x`` is written by almost every unit). What a unit reads is what was last written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn


@dataclass(frozen=True)
class Dims:
    """What shapes and costs depend on beside the modules.

    Attributes:
        height, width: of the latents; 0 for text models.
        tokens: of the text.
    """

    height: int = 0
    width: int = 0
    tokens: int = 0

    def halved(self, times: int) -> tuple[int, int]:
        """Height and width of the feature map after some halvings, each rounded up."""
        height, width = self.height, self.width
        for _ in range(times):
            height, width = -(-height // 2), -(-width // 2)
        return height, width


Shape: TypeAlias = Callable[[Dims], tuple[int, ...]]
"""Shape of one row of a value: ``(P, D)``, or ``(C, h, w)`` where it is spatial."""


@dataclass(frozen=True)
class Heads:
    """Where an attention's heads stand beside each other, before its output projection.

    Attributes:
        value: that holds them, of the attention's own unit or of one before it.
        count: of heads.
        width: of each.
        module: whose input they are, from its first channel on.
    """

    value: str
    count: int
    width: int
    module: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class SitePoint:
    """A site as a unit declares it.

    Attributes:
        path: dotted path within the model, as `fasttrace.sites` spells it after the part.
        kind: one of `fasttrace.sites.KINDS`.
        value: which of the unit's written values it is.
        shape: of one row of that value.
        module: whose output the value is, as a forward hook sees it; ``[B, D]`` counts as one position.
        layer: text models: the layer's number; else ``None``: the place among the sites of its kind.
        stream: ``"image"`` or ``"text"`` where the module's output is a pair of both, else ``""``.
        output: which element of the module's output the value is.
        listed: whether discovery lists it; the others are found by name.
        channels: of a head, whose value is this share of the module's *input*.
        heads: of an attention, whose heads are sites by name (`fasttrace.models.heads`).
    """

    path: str
    kind: str
    value: str
    shape: Shape
    module: nn.Module = field(repr=False, compare=False)
    layer: int | None = None
    stream: str = ""
    output: int = 0
    listed: bool = True
    channels: slice | None = None
    heads: Heads | None = field(default=None, repr=False, compare=False)


class InsideSite(Protocol):
    """A site's map for a unit that makes the site's value inside an op, which restores it there."""

    @property
    def by_op(self) -> bool:
        """Whether the op can do all that happens at the site: one overwrite a row, and nobody else reads the value."""

    def source(self, like: Tensor) -> Tensor:
        """Codes ``[B, P]`` of `fasttrace.ops.restore`, for as many rows of the call as ``like [B, P, ...]`` has."""

    def bank(self, like: Tensor) -> Tensor | None:
        """``[S, P, D]`` that codes name, in the dtype of ``like``."""

    def apply(self, value: Tensor) -> Tensor:
        """The site's value ``[B, P, D]`` or ``[B, C, h, w]`` after everything that happens at the site."""


class Forward:
    """What units read beside values: constants of one forward.

    Args:
        dims: of this forward.
        shared: constants that all rows share, by name: rotary tables, a table of all texts' keys and values.
        by_row: constants with the rows of the whole call first, ``[B, ...]``; a first dimension of 1 is every row's.
        rows: that are there at the beginning; an engine raises it as others join.
        inside: the map of a site by name, for units that make its value inside an op.
    """

    def __init__(
        self,
        dims: Dims,
        shared: Mapping[str, Any],
        by_row: Mapping[str, Tensor],
        rows: int,
        inside: Callable[[str], InsideSite] | None = None,
    ) -> None:
        self.dims, self.shared, self._by_row, self.rows = dims, shared, dict(by_row), rows
        self._inside = inside

    def inside(self, site: str) -> InsideSite:
        """The map of a site whose value is made inside an op."""
        assert self._inside is not None, "units on ops need an engine that gives them the maps of sites"
        return self._inside(site)

    def whole(self, name: str) -> Tensor:
        """A constant's rows of the whole call."""
        return self._by_row[name]

    def set_by_row(self, name: str, tensor: Tensor) -> None:
        """Add a constant with the rows of the whole call first, or a first dimension of 1."""
        self._by_row[name] = tensor

    def of_rows(self, name: str) -> Tensor:
        """A constant's rows that are there now."""
        tensor = self._by_row[name]
        return tensor if tensor.shape[0] == 1 else tensor[: self.rows]


Run: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]
"""Called with the `Forward` and the values read, ``[B, ...]`` each; returns the values written, alone or as a tuple."""


@dataclass(frozen=True)
class Unit:
    """One stretch of a forward.

    Attributes:
        reads, writes: names of values.
        run: a function of them.
        sites: those whose values it writes, in the order in which their hooks fire.
        inside: those whose values it makes and restores within itself, before ``sites``. Rows that join there enter
            before the unit runs.
        modules: those that it calls as modules, so that their hooks and adapters act.
        flops: operations of one row; a multiply and an add are two. Keys and values of the text are not counted where
            they are computed once for all steps.
        alive: numbers of one row that are alive at once within it, beside values that only live on past it.
        shapes: of the written values, where they live on past many units and must be counted there: skip connections.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Run = field(repr=False)
    sites: tuple[SitePoint, ...] = ()
    inside: tuple[SitePoint, ...] = field(default=(), kw_only=True)
    modules: tuple[nn.Module, ...] = field(default=(), repr=False)
    flops: Callable[[Dims], float] = field(default=lambda dims: 0.0, repr=False)
    alive: Callable[[Dims], int] = field(default=lambda dims: 0, repr=False)
    shapes: tuple[Shape, ...] = field(default=(), repr=False)


def weights_in(*modules: nn.Module) -> int:
    """Numbers in the weights of every linear and convolution layer inside some modules; twice that a position."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return sum(layer.weight.numel() for layer in layers)


def feature_map(channels: int, halvings: int) -> Shape:
    """``(C, h, w)`` after some halvings of the latents."""
    return lambda dims: (channels, *dims.halved(halvings))


def pixels(channels: int, halvings: int) -> Shape:
    """``(h w, C)`` after some halvings of the latents."""

    def shape(dims: Dims) -> tuple[int, int]:
        height, width = dims.halved(halvings)
        return height * width, channels

    return shape


def tokens(channels: int) -> Shape:
    """``(T, D)`` of the text."""
    return lambda dims: (dims.tokens, channels)
