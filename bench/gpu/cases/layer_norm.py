"""Layer normalisation before attention and MLPs: UNets' and text encoders' with weights, transformers' modulated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.layer_norm import layer_norm, layer_norm_torch, reference, shape_class

# name, rows, positions, channels, whether it is modulated by row
SHAPES = (
    ("sd15 4096x320", 16, 4096, 320, False),
    ("sd15 1024x640", 16, 1024, 640, False),
    ("sd15 256x1280", 16, 256, 1280, False),
    ("clip_l 77x768", 512, 77, 768, False),
    ("sd3 4096x1536", 8, 4096, 1536, True),
    ("flux 4096x3072", 4, 4096, 3072, True),
)
TOY_SHAPES = (("toy", 2, 6, 24, True),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, rows: int, positions: int, channels: int, modulated: bool) -> BenchCase:
    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        x = torch.randn(rows, positions, channels, dtype=dtype)
        first, second = (torch.randn(*((rows,) if modulated else ()), channels, dtype=dtype) for _ in range(2))
        arguments = (x, None, None, first, second) if modulated else (x, first, second, None, None)

        def by_modules() -> torch.Tensor:
            if modulated:
                return F.layer_norm(x, (channels,)) * (1 + second[:, None]) + first[:, None]
            return F.layer_norm(x, (channels,), first, second)

        return {
            "reference": lambda: reference(*arguments),
            "torch": lambda: layer_norm(*arguments, implementation="torch"),
            "triton": lambda: layer_norm(*arguments, implementation="triton"),
            "as a model writes it": by_modules,
            "compile": compiled(layer_norm_torch, *arguments),
        }

    return BenchCase(
        op="layer_norm",
        shape=f"{name} B={rows}{', modulated' if modulated else ''}",
        shape_class=shape_class(torch.empty(rows, positions, channels, device="meta")),
        flops=0.0,
        bytes=4.0 * rows * positions * channels,
        bound="memory",
        contenders=contenders,
    )
