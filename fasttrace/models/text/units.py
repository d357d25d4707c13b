"""A text model as a list of units, for batches ``[B, T, D]``: order, shapes, costs and sites are read off it.

A layer of tiny CLIP::

    attend      x            -> heads     norm, queries, keys, values, softmax; heads are sites
    project     heads        -> branch    site self_attn
    add         x, branch    -> x
    feed        x            -> branch    norm, MLP; site mlp
    add         x, branch    -> x         site hidden: the whole layer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..unit import Dims, Forward, SitePoint, Unit, tokens
from .description import Layer, TextModel, attended
from .families import canonical_path

INPUTS, OUTPUTS = ("ids",), ("states",)
"""Token ids ``[B, T]``; what the model calls ``last_hidden_state``, ``[B, T, D]``."""


def text_forward(model: TextModel, length: int, attention_mask: Tensor | None = None) -> Forward:
    """What the units read beside values, for prompts of ``length`` tokens and a mask ``[T]`` or ``[B, T]``.

    Raises:
        ModelError: an option of the family that is not served.
    """
    constants = model.constants(length, attention_mask)
    bias = constants.bias if constants.bias.ndim == 4 else constants.bias[None]
    return Forward(Dims(tokens=length), {"constants": constants}, {"bias": bias}, rows=len(bias))


def run_units(units: Sequence[Unit], forward: Forward, **values: Tensor) -> dict[str, Tensor]:
    """One unit after another, on the values ``[B, ...]`` that it names; what is there in the end, by name."""
    forward.rows = len(next(iter(values.values())))
    for unit in units:
        written = unit.run(forward, *(values[name] for name in unit.reads))
        values |= zip(unit.writes, written if isinstance(written, tuple) else (written,), strict=True)
    return values


def text_units(model: TextModel) -> list[Unit]:
    """All units from token ids to the model's last hidden states, in execution order."""
    table = () if model.positions is None else (model.positions,)
    return [
        Unit(("ids",), ("words",), lambda forward, ids: model.words(ids), modules=(model.words,)),
        Unit(("words",), ("x",), _place, modules=table),
        *(unit for layer in model.layers for unit in layer_units(layer, canonical_path(layer.path))),
        Unit(("x",), ("states",), lambda forward, x: model.final_norm(x), modules=(model.final_norm,)),
    ]


def _place(forward: Forward, words: Tensor) -> Tensor:
    positions = forward.shared["constants"].positions
    return words if positions is None else words + positions


def _add(forward: Forward, x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


def _call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def layer_units(layer: Layer, path: str) -> Iterator[Unit]:
    """The units of one layer, whose sites are spelled after ``path``."""
    width = layer.heads * layer.head_width

    def attend(forward: Forward, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        heads = layer.project(_call, _call(layer.norm_attn, x), places, forward.shared["constants"])
        return attended(heads, forward.of_rows("bias"), layer.scale)

    def attend_flops(dims: Dims) -> float:
        return dims.tokens * (_a_token(*layer.projections) + 4 * dims.tokens * width)

    yield Unit(
        ("x",),
        ("heads",),
        attend,
        tuple(_heads(layer, path)),
        (layer.norm_attn, *layer.projections, *layer.head_norms),
        attend_flops,
    )
    yield Unit(
        ("heads",),
        ("branch",),
        lambda forward, heads: layer.out(heads),
        (_point(layer, f"{path}.{layer.family.attention}", "self_attn", "branch", layer.attention),),
        (layer.out,),
        lambda dims: dims.tokens * _a_token(layer.out),
    )
    yield Unit(("x", "branch"), ("x",), _add)
    yield Unit(
        ("x",),
        ("branch",),
        lambda forward, x: layer.mlp.module(layer.norm_mlp(x)),
        (_point(layer, f"{path}.{layer.family.mlp}", "mlp", "branch", layer.mlp.module),),
        (layer.norm_mlp, layer.mlp.module),
        lambda dims: dims.tokens * _a_token(*(weight.module for weight in layer.weights if weight.kind == "mlp")),
    )
    yield Unit(("x", "branch"), ("x",), _add, (_point(layer, path, "hidden", "x", layer.module),))


def _point(layer: Layer, path: str, kind: str, value: str, module: nn.Module) -> SitePoint:
    return SitePoint(path, kind, value, tokens(layer.width), module, layer.number)


def _heads(layer: Layer, path: str) -> Iterator[SitePoint]:
    for head in range(layer.heads):
        channels = slice(head * layer.head_width, (head + 1) * layer.head_width)
        yield SitePoint(
            f"{path}.{layer.family.attention}.heads.{head}",
            "head",
            "heads",
            tokens(layer.head_width),
            layer.out,
            layer.number,
            listed=False,
            channels=channels,
        )


def _a_token(*modules: nn.Module) -> int:
    """Operations of linear modules on one token; transformers' Conv1D is one of them."""
    return sum(2 * module.weight.numel() for module in modules)  # type: ignore[operator, misc]
