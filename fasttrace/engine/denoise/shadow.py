"""A second structure of modules over the user's own weights, on which everything may be set that must not be set there.

The shadow has new module objects, whose parameters and buffers are the user's own tensors. So an edit of a weight is
seen at once, hooks and adapters that the user has put on a module act here too, and processors, memory formats, hooks
and compiled graphs can be set on the shadow without the user's pipeline noticing.

Weights that the shadow needs in another form (channels-last, another dtype) are its own, and are copied anew from the
user's whenever it is asked for: no edit can go unseen, however it was made, and the tensors that compiled graphs hold
stay the same.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ModelError

Module = TypeVar("Module", bound=nn.Module)

# Tables of nn.Module itself: parameters, buffers, hooks. Copied, so that setting one on the shadow sets it there alone.
_TABLES = {name for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set)}


class _Shadow:
    """A shadow with the weights of its own and the user's that they come from."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.structure = _structure(module)
        self.module = clone(module)
        self._derived: dict[int, tuple[Tensor, Tensor]] = {}
        for owner in self.module.modules():
            for table in (owner._parameters, owner._buffers):
                for name, source in table.items():
                    if source is not None:
                        table[name] = self._own(source, dtype)  # type: ignore[assignment]

    def _own(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        wanted = dtype if source.is_floating_point() else source.dtype
        form = torch.channels_last if source.ndim == 4 else torch.preserve_format
        if source.dtype == wanted and (source.ndim != 4 or source.is_contiguous(memory_format=form)):
            return source
        if id(source) not in self._derived:
            own = torch.empty_like(source, dtype=wanted, memory_format=form, requires_grad=False)
            self._derived[id(source)] = (nn.Parameter(own, requires_grad=False), source)
        return self._derived[id(source)][0]

    @torch.no_grad()
    def refresh(self) -> None:
        for own, source in self._derived.values():
            own.copy_(source)


_shadows: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, _Shadow]] = weakref.WeakKeyDictionary()


def shadow_of(module: Module, dtype: torch.dtype) -> Module:
    """The module's shadow with convolutions in channels-last and all weights in ``dtype``, as the user's are now.

    It is kept as long as the user's module lives, and built anew when its structure, hooks or processors change.

    Raises:
        ModelError: a module whose ``forward`` has been replaced on the object, which would still run the user's own.
    """
    kept = _shadows.setdefault(module, {})
    shadow = kept.get(dtype)
    if shadow is None or shadow.structure != _structure(module):
        shadow = kept[dtype] = _Shadow(module, dtype)
    shadow.refresh()
    return shadow.module  # type: ignore[return-value]


def clone(module: Module) -> Module:
    """New modules of the same structure, sharing every parameter and buffer."""
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


def _structure(module: nn.Module) -> list[Any]:
    """What a shadow must be built anew for: modules, their plain attributes, hooks, and where each weight lives."""
    return [
        (
            id(one),
            one.training,
            *(id(hook) for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())),
            *(id(value) for name, value in one.__dict__.items() if name not in _TABLES and name != "training"),
            *(
                (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device)
                for table in (one._parameters, one._buffers)
                for tensor in table.values()
                if tensor is not None
            ),
        )
        for one in module.modules()
    ]
