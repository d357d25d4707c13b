"""The shortcut addition of resnets at the planes of SD1.x and SDXL, plain and with rows restored."""

from __future__ import annotations

import torch

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.residual_restore import reference, residual_restore, residual_torch, shape_class
from fasttrace.ops.restore import KEEP

# name, rows, positions, channels
SHAPES = (
    ("sd15 4096x320", 16, 4096, 320),
    ("sd15 1024x640", 16, 1024, 640),
    ("sd15 256x1280", 16, 256, 1280),
    ("sdxl 16384x320", 8, 16384, 320),
    ("sdxl 4096x640", 8, 4096, 640),
)
TOY_SHAPES = (("toy", 4, 6, 12),)
RESTORED = ("nothing", "a quarter of the positions of every row but the first")


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape, restored) for shape in (TOY_SHAPES if toy else SHAPES) for restored in RESTORED]


def _case(name: str, rows: int, positions: int, channels: int, restored: str) -> BenchCase:
    def contenders() -> dict[str, Contender]:
        hidden, shortcut = (torch.randn(rows, positions, channels, dtype=working_dtype()) for _ in range(2))
        source = torch.full((rows, positions), KEEP, dtype=torch.int32)
        if restored != RESTORED[0]:
            source[1:, : max(1, positions // 4)] = 0
        arguments = (hidden, shortcut, source)
        found: dict[str, Contender] = {
            "reference": lambda: reference(*arguments),
            "torch": lambda: residual_restore(*arguments, implementation="torch"),
            "triton": lambda: residual_restore(*arguments, implementation="triton"),
            "compile": compiled(residual_torch, *arguments),
        }
        if restored == RESTORED[0]:
            found["add"] = lambda: hidden + shortcut
        return found

    return BenchCase(
        op="residual_restore",
        shape=f"{name} B={rows}, {restored} restored",
        shape_class=shape_class(torch.empty(rows, positions, channels, device="meta")),
        flops=0.0,
        bytes=6.0 * rows * positions * channels,
        bound="memory",
        contenders=contenders,
    )
