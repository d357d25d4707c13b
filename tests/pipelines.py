"""The tiny random pipelines that tests share."""

from __future__ import annotations

from typing import Any

import torch

import fasttrace as ft

TINY = ("tiny-sd15", "tiny-sd21", "tiny-sdxl")

_cache: dict[tuple[str, torch.dtype], Any] = {}


def tiny_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random pipeline that the whole session shares; tests must leave it as it is."""
    if (name, dtype) not in _cache:
        _cache[name, dtype] = ft.zoo.random_pipeline(name, dtype=dtype)
    return _cache[name, dtype]
