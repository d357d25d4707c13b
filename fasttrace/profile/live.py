"""How many bytes of tensors a computation holds at once, counted as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine.hooks import hooks


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage of every tensor that is made while it is on, until the tensor and its views are gone.

    Workspaces inside an operator are not seen. Peaks do not depend on the allocator, nor on what is cached.

    Attributes:
        now: bytes held.
        peak: most bytes held at once since the start, or since ``peak`` was set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (id_of(leaf) in self._owners or id_of(leaf) not in given):
                self._hold(leaf)
        return output

    def _hold(self, tensor: Tensor) -> None:
        key, size = id_of(tensor), tensor.untyped_storage().nbytes()
        if key not in self._owners:
            self._owners[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._owners[key] += 1
        weakref.finalize(tensor, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.now -= size


def id_of(tensor: Tensor) -> int:
    """Tensors that share their memory have this in common."""
    return tensor.untyped_storage()._cdata


def live_bytes(run: Callable[[], object], modules: dict[str, nn.Module]) -> tuple[dict[str, int], int]:
    """The most bytes that each module holds at once beyond those that its caller holds, and those of the whole call.

    Args:
        run: calls the modules, none of them inside another.
        modules: by name.
    """
    counter, peaks, whole, held = LiveBytes(), dict[str, int](), 0, 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal whole, held
        whole, held = max(whole, counter.peak), counter.now
        counter.peak = counter.now

    def end(name: str) -> Callable[..., None]:
        return lambda *_: peaks.__setitem__(name, max(peaks.get(name, 0), counter.peak - held))

    handles = [module.register_forward_pre_hook(begin) for module in modules.values()]
    try:
        with hooks([(module, end(name)) for name, module in modules.items()]), counter, torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return peaks, max(whole, counter.peak)
