"""Group normalisation and SiLU at the planes of SD1.x and SDXL, in channels-last memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.group_norm_silu import group_norm_silu, norm_torch, reference, shape_class

# name, rows, side of the plane, channels, groups
SHAPES = (
    ("sd15", 16, 64, 320, 32),
    ("sd15", 16, 64, 960, 32),
    ("sd15", 16, 32, 640, 32),
    ("sd15", 16, 16, 1280, 32),
    ("sd15", 16, 8, 2560, 32),
    ("sd15", 2, 64, 320, 32),
    ("sdxl", 8, 128, 320, 32),
    ("sdxl", 8, 64, 640, 32),
)
TOY_SHAPES = (("toy", 2, 4, 24, 4),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, rows: int, side: int, channels: int, groups: int) -> BenchCase:
    positions = side * side

    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        spatial = torch.randn(rows, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        x = spatial.flatten(2).transpose(1, 2)
        weight, bias = torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)
        arguments = (x, weight, bias, groups)

        def by_modules() -> torch.Tensor:
            return F.silu(F.group_norm(spatial, groups, weight, bias)).flatten(2).transpose(1, 2)

        return {
            "reference": lambda: reference(*arguments),
            "torch": lambda: group_norm_silu(*arguments, implementation="torch"),
            "triton": lambda: group_norm_silu(*arguments, implementation="triton"),
            "group_norm and silu, channels-last": by_modules,
            "compile": compiled(norm_torch, *arguments),
        }

    return BenchCase(
        op="group_norm_silu",
        shape=f"{name} {side}x{side}x{channels} B={rows}",
        shape_class=shape_class(torch.empty(rows, positions, channels, device="meta")),
        flops=0.0,
        bytes=4.0 * rows * positions * channels,
        bound="memory",
        contenders=contenders,
    )
