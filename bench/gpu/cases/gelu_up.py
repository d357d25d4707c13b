"""MLP up-projections without a gate: OpenCLIP's text encoders, and transformers at their image's length."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.gpu.case import BenchCase
from bench.gpu.cases._up import up_cases
from fasttrace.ops import gelu_up

# name, rows, positions, inputs, channels of the result
SHAPES = (
    ("clip_h 77x1024", 64, 77, 1024, 4096),
    ("clip_bigg 77x1280", 512, 77, 1280, 5120),
    ("sd3 4096x1536", 4, 4096, 1536, 6144),
)
TOY_SHAPES = (("toy", 4, 6, 10, 12),)


def cases(toy: bool = False) -> list[BenchCase]:
    return up_cases(gelu_up, 1, TOY_SHAPES if toy else SHAPES, _launcher)


def _launcher() -> Callable[..., Tensor]:
    from fasttrace.kernels.gelu_up.launch import gelu_up as launch

    return launch
