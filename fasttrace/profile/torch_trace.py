"""A torch.profiler trace of one UNet call, for whoever wants to look further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .measure import UNetCaller


def write_trace(pipe: Any, batch: int, path: Path) -> None:
    """Write a Chrome trace of one call of ``batch`` samples."""
    call = UNetCaller(pipe)
    call(batch)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch_profile(activities=activities) as recorded:
        call(batch)
    recorded.export_chrome_trace(str(path))
