"""Hooks on the user's own modules, gone afterwards whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from .values import element, with_element


class Hooked(Protocol):
    """Where a value passes: `fasttrace.sites.Site` describes the attributes."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def kind(self) -> str: ...

    @property
    def output(self) -> int: ...

    @property
    def channels(self) -> slice | None: ...


@contextlib.contextmanager
def hooks(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks for a while."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def value_hooks(pairs: Iterable[tuple[Hooked, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Hooks through which values of sites pass, ``[B, ...]``; what one returns, if anything, takes their place.

    A modulation ``[B, D]`` passes as one position, ``[B, 1, D]``.
    """
    handles = [_value_hook(site, see) for site, see in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _value_hook(site: Hooked, see: Callable[[Tensor], Tensor | None]) -> Any:
    channels, flat = site.channels, site.kind == "modulation"
    if channels is None:

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            made = element(output, site.output)
            value = see(made.unsqueeze(1) if flat else made)
            if value is None:
                return None
            return with_element(output, site.output, value.squeeze(1) if flat else value)

        return site.module.register_forward_hook(after)

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        value = see(args[0][..., channels])
        if value is None:
            return None
        heads = args[0].clone()
        heads[..., channels] = value
        return heads, *args[1:]

    return site.module.register_forward_pre_hook(before)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call a model and its modules as they were before ``.compile()``: what is compiled may know none of its hooks."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
