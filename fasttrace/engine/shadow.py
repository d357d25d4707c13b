"""A second structure of modules over the user's own weights, on which everything may be set that must not be set there.

The shadow has new module objects, whose parameters and buffers are the user's own tensors. So an edit of a weight is
seen at once, hooks and adapters that the user has put on a module act here too, and processors, memory formats, hooks
and compiled graphs can be set on the shadow without the user's pipeline noticing.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..errors import ModelError

Module = TypeVar("Module", bound=nn.Module)

# Tables of nn.Module itself: parameters, buffers, hooks. Copied, so that setting one on the shadow sets it there alone.
_TABLES = {name for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set)}


def shadow_of(module: Module) -> Module:
    """New modules of the same structure, sharing every parameter and buffer.

    Raises:
        ModelError: a module whose ``forward`` has been replaced on the object, which would still run the user's own.
    """
    return _clone(module, {})


def _clone(module: Module, done: dict[int, nn.Module]) -> Module:
    if id(module) in done:
        return done[id(module)]  # type: ignore[return-value]
    if "forward" in module.__dict__:
        raise ModelError(
            f"{type(module).__name__} has its forward replaced on the object (offloading, or a patched method): "
            "restore it first, or register a forward hook instead"
        )
    other = object.__new__(type(module))
    done[id(module)] = other
    for name, value in module.__dict__.items():
        if name != "_compiled_call_impl":
            other.__dict__[name] = value.copy() if name in _TABLES else value
    other.__dict__["_modules"] = {
        name: None if child is None else _clone(child, done) for name, child in module._modules.items()
    }
    return other
