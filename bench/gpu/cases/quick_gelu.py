"""CLIP-L's MLP up-projection, for a sweep's batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.gpu.case import BenchCase
from bench.gpu.cases._up import up_cases
from fasttrace.ops import quick_gelu

# name, rows, positions, inputs, channels of the result
SHAPES = (
    ("clip_l 77x768", 4, 77, 768, 3072),
    ("clip_l 77x768", 64, 77, 768, 3072),
    ("clip_l 77x768", 512, 77, 768, 3072),
)
TOY_SHAPES = (("toy", 4, 6, 10, 12),)


def cases(toy: bool = False) -> list[BenchCase]:
    return up_cases(quick_gelu, 1, TOY_SHAPES if toy else SHAPES, _launcher)


def _launcher() -> Callable[..., Tensor]:
    from fasttrace.kernels.quick_gelu.launch import quick_gelu as launch

    return launch
