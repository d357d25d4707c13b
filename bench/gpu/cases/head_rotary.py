"""Queries of transformers, normalised and rotated: SD3.5 without a rotation, FLUX, Lumina 2."""

from __future__ import annotations

import torch

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.head_rotary import head_rotary, head_rotary_torch, reference, shape_class

# name, rows, positions, heads, head dimension, whether it is rotated
SHAPES = (
    ("sd35 4096x24x64", 8, 4096, 24, 64, False),
    ("flux 4608x24x128", 4, 4608, 24, 128, True),
    ("lumina 4096x24x96", 4, 4096, 24, 96, True),
)
TOY_SHAPES = (("toy", 2, 6, 2, 8, True),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, rows: int, positions: int, heads: int, width: int, rotated: bool) -> BenchCase:
    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        x, weight = torch.randn(rows, positions, heads, width, dtype=dtype), torch.randn(width, dtype=dtype)
        angles = 6 * torch.rand(positions, width // 2)
        arguments = (x, weight, *((angles.cos(), angles.sin()) if rotated else (None, None)))
        return {
            "reference": lambda: reference(*arguments),
            "torch": lambda: head_rotary(*arguments, implementation="torch"),
            "triton": lambda: head_rotary(*arguments, implementation="triton"),
            "compile": compiled(head_rotary_torch, *arguments),
        }

    return BenchCase(
        op="head_rotary",
        shape=f"{name} B={rows}{', rotated' if rotated else ''}",
        shape_class=shape_class(torch.empty(rows, positions, heads, width, device="meta")),
        flops=0.0,
        bytes=4.0 * rows * positions * heads * width,
        bound="memory",
        contenders=contenders,
    )
