"""Output projections and MLPs' ways down at the shapes of SD1.x, SDXL and CLIP-L, plain and with rows restored."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.linear_restore import linear_restore, linear_torch, reference, shape_class
from fasttrace.ops.restore import KEEP

# name, rows, positions, inputs, channels
SHAPES = (
    ("sd15 attention out 4096x320", 16, 4096, 320, 320),
    ("sd15 mlp down 4096x320", 16, 4096, 1280, 320),
    ("sd15 attention out 1024x640", 16, 1024, 640, 640),
    ("sd15 mlp down 1024x640", 16, 1024, 2560, 640),
    ("sd15 attention out 256x1280", 16, 256, 1280, 1280),
    ("sd15 mlp down 256x1280", 16, 256, 5120, 1280),
    ("sdxl attention out 1024x1280", 8, 1024, 1280, 1280),
    ("sdxl mlp down 1024x1280", 8, 1024, 5120, 1280),
    ("clip_l attention out 77x768", 512, 77, 768, 768),
    ("clip_l mlp down 77x768", 512, 77, 3072, 768),
    ("clip_l mlp down 77x768", 16, 77, 3072, 768),
)
TOY_SHAPES = (("toy", 4, 6, 10, 12),)
RESTORED = ("nothing", "a quarter of the positions of every row but the first")
CANDIDATES = ((64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3))


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape, restored) for shape in (TOY_SHAPES if toy else SHAPES) for restored in RESTORED]


def _case(name: str, rows: int, positions: int, width: int, channels: int, restored: str) -> BenchCase:
    total = rows * positions
    flops = 2.0 * total * width * channels
    traffic = 2.0 * (total * (width + 2 * channels) + width * channels)

    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        x, residual = (
            torch.randn(rows, positions, width, dtype=dtype),
            torch.randn(rows, positions, channels, dtype=dtype),
        )
        weight, bias = torch.randn(channels, width, dtype=dtype) * width**-0.5, torch.randn(channels, dtype=dtype)
        source = torch.full((rows, positions), KEEP, dtype=torch.int32)
        if restored != RESTORED[0]:
            source[1:, : max(1, positions // 4)] = 0
        arguments = (x, weight, bias, residual, source)

        def tiled(tile: tuple[int, ...]) -> Contender:
            names = dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), tile, strict=True))

            def run() -> torch.Tensor:
                from fasttrace.kernels.linear_restore.launch import linear_restore as launch

                return launch(*arguments, tile=names)

            return run

        found: dict[str, Contender] = {
            "reference": lambda: reference(*arguments),
            "torch": lambda: linear_restore(*arguments, implementation="torch"),
            "triton": lambda: linear_restore(*arguments, implementation="triton"),
            "epilogue": lambda: linear_restore(*arguments, implementation="epilogue"),
            "compile": compiled(linear_torch, *arguments),
        }
        if restored == RESTORED[0]:
            found["linear, then residual"] = lambda: F.linear(x, weight, bias) + residual
            found |= {f"triton {tile}": tiled(tile) for tile in CANDIDATES}
        return found

    return BenchCase(
        op="linear_restore",
        shape=f"{name} K={width} B={rows}, {restored} restored",
        shape_class=shape_class(
            torch.empty(rows, positions, width, device="meta"), torch.empty(channels, width, device="meta")
        ),
        flops=flops,
        bytes=traffic,
        bound="compute" if flops > 266 * traffic else "memory",
        contenders=contenders,
    )
