"""The most memory that a call takes, beside what was held before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(run: Callable[[], Result]) -> tuple[Result, int | None]:
    """Call ``run``; return its result, and the bytes that it held at most beyond those held before, result included.

    On a GPU they are those of torch's allocator. On Linux they are the process's high-water mark of resident memory,
    reset just before, once freed memory has gone back to the system: what the call takes anew is counted, whoever takes
    it. Elsewhere, and where the mark cannot be reset, ``None``.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = run()
        return result, torch.cuda.max_memory_allocated() - held
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps what it likes
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # resets VmHWM: proc(5)
        before = _resident("VmRSS")
    except (OSError, StopIteration):
        return run(), None
    result = run()
    return result, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
