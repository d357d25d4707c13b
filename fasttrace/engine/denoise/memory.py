"""How many rows one call may have: from a model of its memory, halved when that was too much, and remembered."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .cost import Cost

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""More rows do not run faster: on a CPU their activations leave the cache (as many as of float32; twice as many of a
type half as wide), on a GPU they fill it already."""

_SHARE = 0.6
"""Of the free memory that a call's activations may take; the rest is for what rows leave to others, for workspaces of
convolutions and for fragmentation."""

_remembered: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def row_bytes(cost: Cost, dtype: torch.dtype) -> int:
    """Memory of one row of a call at its widest point, beside weights and latents."""
    return cost.widest * dtype.itemsize


class BatchSize:
    """The batch size of one denoiser at one resolution and dtype on one device.

    Args:
        model: the user's; the size is remembered as long as it lives.
        cost: of one row.
        size: of the latents, and the number of tokens.
        dtype: that the denoiser computes in.
        most: the user's ``max_batch``, which is taken as it is.
    """

    def __init__(self, model: Any, cost: Cost, size: tuple[int, ...], dtype: torch.dtype, most: int | None) -> None:
        device = model.device
        self._kept = _remembered.setdefault(model, {})
        self._key = (size, dtype, str(device), most)
        free = free_bytes(device)
        if self._key not in self._kept:
            fitting = max(1, int(free * _SHARE) // max(1, row_bytes(cost, dtype))) if free is not None else 1 << 30
            useful = MOST_ROWS["cpu"] * 4 // dtype.itemsize if device.type == "cpu" else MOST_ROWS["cuda"]
            self._kept[self._key] = most or min(fitting, useful)

    @property
    def rows(self) -> int:
        return self._kept[self._key]

    def halve(self) -> bool:
        """After running out of memory; ``False`` where a single row does not fit either."""
        if self.rows == 1:
            return False
        self._kept[self._key] = self.rows // 2
        return True


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for tensors, or ``None`` where the device does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as file:
                fields = dict(line.split(":", 1) for line in file)
            return int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError):
            return None
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)
