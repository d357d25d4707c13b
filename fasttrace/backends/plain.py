"""The model underneath another library's wrapping: the same weights in modules that nothing has been put around."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def plain(module: Module) -> Module:
    """New module objects of the model's own classes, sharing every parameter and buffer with ``module``.

    TransformerLens puts components around modules, with the module itself as ``_original_component``; nnsight replaces
    ``forward`` on the objects. Neither is carried over. Hooks are: they belong to the user.
    """
    inner: Any = module
    while (wrapped := inner._modules.get("_original_component")) is not None:
        inner = wrapped
    other: Module = object.__new__(type(inner))
    other.__dict__ = {name: value for name, value in inner.__dict__.items() if name != "forward"}
    other.__dict__["_modules"] = {
        name: None if child is None else plain(child) for name, child in inner._modules.items()
    }
    return other
