"""How much memory tensors take at once, measured at every operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it take at once, weights left out."""

    def __init__(self, weights: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._left_out = {one.untyped_storage()._cdata for one in weights.parameters()}
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self._add(one)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._left_out:
            return
        if key not in self._users:
            self.now += size
            self.most = max(self.most, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size
