"""The UNet's MLP up-projections at the shapes of SD1.x and SDXL."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.gpu.case import BenchCase
from bench.gpu.cases._up import up_cases
from fasttrace.ops import geglu

# name, rows, positions, inputs, channels of the result
SHAPES = (
    ("sd15 4096x320", 16, 4096, 320, 1280),
    ("sd15 1024x640", 16, 1024, 640, 2560),
    ("sd15 256x1280", 16, 256, 1280, 5120),
    ("sd15 64x1280", 16, 64, 1280, 5120),
    ("sdxl 4096x640", 8, 4096, 640, 2560),
    ("sdxl 1024x1280", 8, 1024, 1280, 5120),
)
TOY_SHAPES = (("toy", 4, 6, 10, 12),)


def cases(toy: bool = False) -> list[BenchCase]:
    return up_cases(geglu, 2, TOY_SHAPES if toy else SHAPES, _launcher)


def _launcher() -> Callable[..., Tensor]:
    from fasttrace.kernels.geglu.launch import geglu as launch

    return launch
