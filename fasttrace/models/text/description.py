"""What there is to know of a text model, in terms of the user's own modules: its family, and what follows from it.

Every layer of a family is ``h += attn(norm(h)); h += mlp(norm(h))``. A `Family` says where in a layer the parts are,
and the few ways in which families differ: how positions enter, what is added to the scores, who reads whom. A
`TextModel` is a model as its family describes it. Two executors read it: `fasttrace.models.text.units` on whole
batches, and the packed text engine on the tokens of many runs, which calls linear modules in its own way (`Call`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Call: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""How an executor calls a module on its own layout of tokens, ``[..., K] -> [..., D]``."""

Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries ``[..., H, d]``, keys and values ``[..., G, d]`` of tokens ``[...]``."""


@dataclass(frozen=True)
class Family:
    """How the models of a family are built, as paths and plain functions.

    Attributes:
        models: classes of the stack of layers, without a language-modelling head.
        layers: classes of a layer. Sites are found by class, never by raw path: the path of CLIP's layers changed
            between versions of transformers.
        causal: whether a token reads only itself and the tokens before it.
        stack: of a model, the module that ``words``, ``positions`` and ``final_norm`` are paths in.
        words: word embeddings.
        final_norm: after the last layer.
        norm_attn, attention, norm_mlp, mlp: within a layer.
        projections: to queries, keys and values within the attention; or to all three at once.
        out: the attention's output projection.
        up, down: projections within the MLP; of ``up`` those that there are.
        head_width: of an attention.
        scale: of an attention, the factor on its scores.
        activation: within the MLP where that is ``down(activation(up(x)))`` and nothing more, else ``None``.
        positions: table of position embeddings, added to the words, or ``None``.
        head_norms: within the attention, on each query and each key, where there are such.
        relative: of a stack and a length, what is added to the scores of every layer, ``[H, T, T]``.
        rotary: of a stack and a length, cosine and sine ``[T, 1, d]`` that turn queries and keys.
        check: of a stack and a length, raises ModelError for an option that is not served.
    """

    models: tuple[str, ...]
    layers: tuple[str, ...]
    causal: bool
    stack: Callable[[Any], Any]
    words: str
    final_norm: str
    norm_attn: str
    attention: str
    norm_mlp: str
    mlp: str
    projections: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    head_width: Callable[[Any], int]
    scale: Callable[[Any], float]
    activation: str | None = None
    positions: str | None = None
    head_norms: tuple[str, ...] = ()
    relative: Callable[[Any, int], Tensor] | None = None
    rotary: Callable[[Any, int], tuple[Tensor, Tensor]] | None = None
    check: Callable[[Any, int], None] = lambda stack, length: None


@dataclass(frozen=True)
class FeedForward:
    """An MLP module, and where it is ``down(activation(up(x)))`` and nothing more, its parts."""

    module: nn.Module
    parts: tuple[nn.Module, nn.Module, nn.Module] | None = None


@dataclass(frozen=True)
class Weight:
    """A linear projection within a layer.

    Attributes:
        kind: of the site that it is within: ``"self_attn"`` or ``"mlp"``.
        name: within the site's module.
        into_hidden: whether what it returns is added to the hidden state.
        before_attention: whether it makes queries, keys or values; all that follows the others takes a token by itself.
    """

    kind: str
    name: str
    module: nn.Module = field(repr=False)
    into_hidden: bool
    before_attention: bool


@dataclass(frozen=True)
class Constants:
    """What all layers read beside the hidden state, for one length and attention mask.

    Attributes:
        bias: boolean ``[..., 1, T, T]``, True where a query may read a key; or ``[..., H, T, T]``, added to the scores.
        positions: added to the word embeddings, ``[T, D]``, or ``None``.
        rotary: cosine and sine ``[T, 1, d]``, or ``None``.
    """

    bias: Tensor
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of a model: the parts that its family names.

    Attributes:
        family: that it is of.
        number: among the model's layers.
        path: within the model, as torch spells it.
        module: the layer itself, as the user's hooks see it; so is ``attention``. No executor calls these two.
        projections: to queries, keys and values.
        head_norms: on queries and keys, or none.
        head_width: numbers of a head, ``d``.
        heads: number of heads that query, ``H``.
        scale: factor on the scores.
        weights: the layer's linear projections; of each site first the one that writes to the hidden state.
    """

    family: Family
    number: int
    path: str
    module: nn.Module = field(repr=False)
    attention: nn.Module = field(repr=False)
    norm_attn: nn.Module = field(repr=False)
    projections: tuple[nn.Module, ...] = field(repr=False)
    head_norms: tuple[nn.Module, ...] = field(repr=False)
    out: nn.Module = field(repr=False)
    head_width: int
    heads: int
    scale: float
    norm_mlp: nn.Module = field(repr=False)
    mlp: FeedForward = field(repr=False)
    weights: tuple[Weight, ...]

    @property
    def width(self) -> int:
        """Channels of the hidden state, ``D``."""
        return _width_in(self.projections[0])

    def project(self, call: Call, x: Tensor, positions: Tensor, constants: Constants) -> Heads:
        """Queries, keys and values of normed tokens ``[..., D]`` that stand at ``positions`` ``[...]``."""
        parts = [call(module, x) for module in self.projections]
        q, k, v = (
            part.view(*part.shape[:-1], -1, self.head_width)
            for part in (parts if len(parts) == 3 else parts[0].chunk(3, dim=-1))
        )
        if self.head_norms:
            q, k = (call(norm, heads) for norm, heads in zip(self.head_norms, (q, k), strict=True))
        if constants.rotary is not None:
            q, k = (_turned(heads, positions, *constants.rotary) for heads in (q, k))
        return q, k, v


@dataclass(frozen=True)
class TextModel:
    """A model of a known family.

    Attributes:
        words: the word embeddings' module.
        positions: the table of position embeddings, or ``None``.
        layers: in execution order.
        final_norm: after the last layer.
    """

    family: Family
    stack: nn.Module = field(repr=False)
    words: nn.Module = field(repr=False)
    positions: nn.Module | None = field(repr=False)
    layers: tuple[Layer, ...]
    final_norm: nn.Module = field(repr=False)

    def constants(self, length: int, attention_mask: Tensor | None = None) -> Constants:
        """For prompts of ``length`` tokens; an attention mask is ``[T]`` or ``[B, T]``, 0 where nothing may be read.

        Raises:
            ModelError: an option of the family that is not served.
        """
        family, stack = self.family, self.stack
        family.check(stack, length)
        numbers = torch.arange(length, device=next(self.words.parameters()).device)
        bias = _allowed(length, attention_mask, numbers.device, family.causal)
        if family.relative is not None:
            added = family.relative(stack, length)
            bias = torch.where(bias, added, torch.finfo(added.dtype).min)
        return Constants(
            bias,
            None if self.positions is None else self.positions(numbers[None])[0],
            None if family.rotary is None else family.rotary(stack, length),
        )

    def embed(self, call: Call, ids: Tensor, constants: Constants, noise: Tensor | None = None) -> Tensor:
        """The first layer's input ``[..., T, D]``, noise added to the word embeddings."""
        words = call(self.words, ids)
        if noise is not None:
            words = words + noise
        return words if constants.positions is None else words + constants.positions


def layer_of(family: Family, number: int, path: str, module: nn.Module) -> Layer:
    """Look up a family's parts in one layer."""
    attention, mlp = (module.get_submodule(name) for name in (family.attention, family.mlp))
    weights = [
        *_weights("self_attn", attention, (family.out,), into_hidden=True),
        *_weights("self_attn", attention, family.projections, before_attention=True),
        *_weights("mlp", mlp, (family.down,), into_hidden=True),
        *_weights("mlp", mlp, family.up),
    ]
    out, width, activation = weights[0].module, family.head_width(attention), family.activation
    parts = None
    if activation is not None:
        up, down = (mlp.get_submodule(name) for name in (*family.up, family.down))
        parts = up, mlp.get_submodule(activation), down
    return Layer(
        family,
        number,
        path,
        module,
        attention,
        module.get_submodule(family.norm_attn),
        tuple(weight.module for weight in weights if weight.before_attention),
        tuple(attention.get_submodule(name) for name in family.head_norms if hasattr(attention, name)),
        out,
        width,
        _width_in(out) // width,
        family.scale(attention),
        module.get_submodule(family.norm_mlp),
        FeedForward(mlp, parts),
        tuple(weights),
    )


def _weights(
    kind: str, module: nn.Module, names: tuple[str, ...], *, into_hidden: bool = False, before_attention: bool = False
) -> Iterator[Weight]:
    for name in names:
        if hasattr(module, name):
            yield Weight(kind, name, module.get_submodule(name), into_hidden, before_attention)


def attended(heads: Heads, bias: Tensor, scale: float) -> Tensor:
    """Queries ``[n, Q, H, d]`` over keys and values ``[n, T, G, d]``: ``[n, Q, H x d]``.

    Args:
        bias: boolean or added to the scores, ``[1 or H, Q, T]``, or with a first dimension ``n`` or 1 before these.
    """
    q, k, v = (x.transpose(1, 2) for x in heads)
    # torch's fast CPU kernel takes masks of two or four dimensions.
    mask = bias if bias.ndim == 4 else bias[0] if len(bias) == 1 else bias[None]
    result = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return result.transpose(1, 2).flatten(2)


def _turned(heads: Tensor, positions: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads ``[..., H, d]`` turned by their positions' angles."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine[positions] + torch.cat((-second, first), dim=-1) * sine[positions]


def _allowed(length: int, attention_mask: Tensor | None, device: torch.device, causal: bool) -> Tensor:
    """Which keys each query may read: boolean ``[1, T, T]``, or ``[B, 1, T, T]`` where the mask has rows."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril()
    return allowed[None] if attention_mask is None else allowed & attention_mask.bool()[..., None, None, :]


def _width_in(module: Any) -> int:
    """Channels that a linear module reads; transformers' Conv1D keeps its weight as ``[in, out]``."""
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])
