"""What the cases of both MLP up-projections share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops._up import shape_class
from fasttrace.ops.restore import KEEP

Shape = tuple[str, int, int, int, int]  # name, rows, positions, inputs, channels of the result
CANDIDATES = ((64, 64, 64, 4, 4), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 32, 4, 4))
SKIPPED = ("nothing", "every fourth row")


def up_cases(
    op: ModuleType, parts: int, shapes: tuple[Shape, ...], launcher: Callable[[], Callable[..., Tensor]]
) -> list[BenchCase]:
    """Cases of the op in module ``op``, whose weight has ``parts`` rows for each channel of the result."""
    return list(_cases(op, parts, shapes, launcher))


def _cases(
    op: ModuleType, parts: int, shapes: tuple[Shape, ...], launcher: Callable[[], Callable[..., Tensor]]
) -> Iterator[BenchCase]:
    name = op.__name__.rsplit(".", 1)[-1]
    for shape, rows, positions, width, channels in shapes:
        for skipped in SKIPPED:
            computed = positions * (rows if skipped == SKIPPED[0] else rows - rows // 4)
            flops = 2.0 * computed * width * parts * channels
            traffic = 2.0 * (computed * width + rows * positions * channels + parts * channels * width)
            meta = (
                torch.empty(rows, positions, width, device="meta"),
                torch.empty(parts * channels, width, device="meta"),
            )
            yield BenchCase(
                op=name,
                shape=f"{shape} B={rows}, {skipped} restored",
                shape_class=shape_class(*meta),
                flops=flops,
                bytes=traffic,
                bound="compute" if flops > 266 * traffic else "memory",
                contenders=_contenders(op, name, rows, positions, width, parts * channels, skipped, launcher),
            )


def _contenders(
    op: ModuleType,
    name: str,
    rows: int,
    positions: int,
    width: int,
    outputs: int,
    skipped: str,
    launcher: Callable[[], Callable[..., Tensor]],
) -> Callable[[], dict[str, Contender]]:
    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        x = torch.randn(rows, positions, width, dtype=dtype)
        weight, bias = torch.randn(outputs, width, dtype=dtype) * width**-0.5, torch.randn(outputs, dtype=dtype)
        source = None
        if skipped != SKIPPED[0]:
            source = torch.where(torch.arange(rows) % 4 == 1, 0, KEEP).to(torch.int32)[:, None].expand(rows, positions)
        arguments = (x, weight, bias, source)
        call, eager = getattr(op, name), getattr(op, f"{name}_torch")

        def tiled(tile: tuple[int, ...]) -> Contender:
            names = dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), tile, strict=True))
            return lambda: launcher()(*arguments, tile=names)

        found: dict[str, Contender] = {
            "reference": lambda: op.reference(*arguments),
            "torch": lambda: call(*arguments, implementation="torch"),
            "triton": lambda: call(*arguments, implementation="triton"),
            "compile": compiled(eager, *arguments),
        }
        if source is None:
            found |= {f"triton {tile}": tiled(tile) for tile in CANDIDATES}
        return found

    return contenders
