"""What the packed engine does not run: a user's hooks and replacements on modules that it does not call.

It calls projections, norms and MLPs, with their hooks and adapters, and does the rest of a layer itself. A hook or a
``forward`` of the user's own on a whole layer or an attention would act in the user's own model and not here, so that a
clean run of one would be compared with restored runs of the other. Many such hooks only watch, or move weights between
devices. So where there are any, the model is run once as the user would, beside the units of its description, and
refused where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...models.text.families import text_body, text_head, text_model
from ...models.text.units import run_units, text_forward, text_units
from ..hooks import value_hooks
from ..requests.text import TextRequest, encoder_path
from .linear import on_packed


def check_bypassed(request: TextRequest) -> None:
    """Refuse hooks and replacements that the packed engine would leave out.

    Raises:
        ModelError: some of them change what the model returns for the clean prompt.
    """
    suspects = _suspects(request)
    if not suspects or all(_agree(*pair) for pair in _own_and_served(request)):
        return
    others = f" and {len(suspects) - 1} more modules" if len(suspects) > 1 else ""
    raise ModelError(
        f"{type(request.encoder).__name__}: a hook or a replaced forward on {suspects[0]}{others} changes what the "
        "model returns, and the fast engine, which calls only projections, norms and MLPs, would leave it out: remove "
        'it, put it on one of those, or use engine="oracle"'
    )


def _entry(request: TextRequest) -> nn.Module:
    """What is called for the output; a language-modelling head runs for logits alone."""
    entry: nn.Module = request.encoder if request.output == "logits" else text_body(request.encoder)
    return entry


def _suspects(request: TextRequest) -> list[str]:
    """Modules that do more, or something else, than their class in transformers says, and are not called."""
    model, torch_hooks = request.encoder, torch.nn.modules.module
    everywhere = bool(torch_hooks._global_forward_hooks or torch_hooks._global_forward_pre_hooks)
    if not everywhere and not any(map(_is_altered, model.modules())):
        return []
    runs = {id(module) for module in _entry(request).modules()}
    heads = [getattr(model, name, None) for name in ("text_projection", "lm_head")]
    units = [module for unit in text_units(text_model(model)) for module in unit.modules]
    called = {id(part) for module in (*units, *heads) if module is not None for part in module.modules()}
    return [
        path or type(model).__name__
        for path, module in model.named_modules()
        if id(module) in runs - called and (everywhere or _is_altered(module))
    ]


def _is_altered(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # transformers leaves hooks of its own on layers, by which it records what they return.
    return "forward" in vars(module) or not all(map(_is_of_transformers, (type(module), *hooks)))


def _is_of_transformers(thing: Any) -> bool:
    return getattr(thing, "__module__", "").partition(".")[0] in ("transformers", "torch")


def _own_and_served(request: TextRequest) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model returns of the clean prompt, ``[..., D]``, and what its description's units give for it."""
    ids, mask, column = request.ids, request.attention_mask, request.column
    # Where padding is not read, its own states depend on how an attention treats a query that may read nothing.
    read = slice(None) if mask is None else mask.bool()
    seen: list[Tensor] = []
    (deepest,) = (site for site in request.sites.values() if (site.kind, site.layer) == ("hidden", request.depth - 1))
    with value_hooks([(deepest, seen.append)]):
        own: Any = _entry(request)(input_ids=ids[None], attention_mask=None if mask is None else mask[None])
    described = text_model(request.encoder)
    forward, units = text_forward(described, len(ids), mask), text_units(described)
    path = encoder_path(deepest.name)
    end = 1 + next(place for place, unit in enumerate(units) if any(point.path == path for point in unit.sites))
    values = run_units(units[:end], forward, ids=ids[None])
    yield seen[0][0, read], values["x"][0, read]
    states = run_units(units[end:], forward, **values)["states"][0]
    if request.output not in ("pooled", "logits"):
        yield own.last_hidden_state[0, read], states[read]
        return
    assert column is not None
    served = text_head(on_packed, request.encoder, states[column][None], request.answers)[0]
    if request.output == "logits":
        yield own.logits[0, column, request.answers], served
    else:
        yield (own.text_embeds if hasattr(own, "text_embeds") else own.pooler_output)[0], served


def _agree(own: Tensor, served: Tensor) -> bool:
    """Whether vectors ``[..., D]`` differ by rounding alone; what is not finite is refused elsewhere, by its run."""
    error, scale = (x.double().norm(dim=-1) for x in (served - own, own))
    return not bool((error > scale * torch.finfo(own.dtype).eps ** 0.5).any())
