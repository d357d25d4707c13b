"""Low-rank edits: one matrix, one MLP, and all cross-attention keys and values of SD1.x and SDXL at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.rank_update import rank_update, reference, shape_class

SD15_CROSS = ((320, 768),) * 10 + ((640, 768),) * 10 + ((1280, 768),) * 12
SDXL_CROSS = ((640, 2048),) * 20 + ((1280, 2048),) * 120
# name, matrices, rank
SHAPES = (
    ("clip_l out_proj", ((768, 768),), 1),
    ("clip_l out_proj", ((768, 768),), 16),
    ("clip_l mlp", ((768, 3072),), 4),
    ("clip_bigg out_proj", ((1280, 1280),), 1),
    ("sd15 cross-attention, 32 matrices", SD15_CROSS, 1),
    ("sd15 cross-attention, 32 matrices", SD15_CROSS, 16),
    ("sd15 cross-attention, 32 matrices", SD15_CROSS, 64),
    ("sdxl cross-attention, 140 matrices", SDXL_CROSS, 4),
)
TOY_SHAPES = (("toy", ((5, 7), (16, 32)), 3),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, matrices: tuple[tuple[int, int], ...], rank: int) -> BenchCase:
    elements = sum(n * k for n, k in matrices)

    def contenders() -> dict[str, Contender]:
        weights, out = (_views(matrices, working_dtype()) for _ in range(2))
        weights[0].normal_()
        left = [torch.randn(n, rank) for n, _ in matrices]
        right = [torch.randn(k, rank) for _, k in matrices]

        def call(implementation: str) -> Contender:
            def run() -> Tensor:
                rank_update(weights[1], left, right, out=out[1], implementation=implementation)
                return out[0]

            return run

        def addmm(weights: list[Tensor], left: list[Tensor], right: list[Tensor]) -> Tensor:
            parts = [
                torch.addmm(w, a.to(w.dtype), b.to(w.dtype).T) for w, a, b in zip(weights, left, right, strict=True)
            ]
            return torch.cat([part.flatten() for part in parts])

        def truth() -> Tensor:
            reference(weights[1], left, right, out[1])
            return out[0].clone()

        return {
            "reference": truth,
            "torch": call("torch"),
            "triton": call("triton"),
            "cuda": call("cuda"),
            "addmm, compile": compiled(addmm, weights[1], left, right),
        }

    meta = [torch.empty(n, rank, device="meta") for n, _ in matrices]
    return BenchCase(
        op="rank_update",
        shape=f"{name} r={rank}",
        shape_class=shape_class(meta, meta),
        flops=2.0 * elements * rank,
        bytes=4.0 * elements,
        bound="memory",
        contenders=contenders,
    )


def _views(matrices: tuple[tuple[int, int], ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One buffer, and the matrices as views of it."""
    buffer = torch.empty(sum(n * k for n, k in matrices), dtype=dtype)
    pieces = buffer.split([n * k for n, k in matrices])
    return buffer, [piece.view(shape) for piece, shape in zip(pieces, matrices, strict=True)]
