"""Attention at the shapes of SD1.x, SDXL and CLIP-L, with and without a source map."""

from __future__ import annotations

import torch

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import sdpa_rivals, working_dtype
from fasttrace.ops.attention_restore import attention_restore, reference, shape_class
from fasttrace.ops.restore import KEEP, ZERO

# name, rows, queries, keys, heads, head dimension, causal
SHAPES = (
    ("sd15 self 4096x40", 16, 4096, 4096, 8, 40, False),
    ("sd15 self 1024x80", 16, 1024, 1024, 8, 80, False),
    ("sd15 self 256x160", 16, 256, 256, 8, 160, False),
    ("sd15 self 64x160", 16, 64, 64, 8, 160, False),
    ("sd15 cross 4096x40", 16, 4096, 77, 8, 40, False),
    ("sd15 cross 1024x80", 16, 1024, 77, 8, 80, False),
    ("sd15 cross 256x160", 16, 256, 77, 8, 160, False),
    ("sdxl self 4096x64", 8, 4096, 4096, 10, 64, False),
    ("sdxl self 1024x64", 8, 1024, 1024, 20, 64, False),
    ("sdxl cross 4096x64", 8, 4096, 77, 10, 64, False),
    ("clip_l causal 77x64", 512, 77, 77, 12, 64, True),
)
TOY_SHAPES = (
    ("toy self", 4, 12, 12, 2, 40, False),
    ("toy cross", 4, 130, 7, 1, 8, False),
    ("toy causal", 4, 9, 9, 2, 16, True),
)
# None: no source map at all. Otherwise how many of each 8 rows are restored elsewhere.
RESTORED = (None, 0, 2)
# Other blocks that may be faster at long self-attention: queries, keys, warps, stages.
CANDIDATES = ((128, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape, restored) for shape in (TOY_SHAPES if toy else SHAPES) for restored in RESTORED]


def _case(
    name: str, rows: int, queries: int, keys: int, heads: int, width: int, causal: bool, restored: int | None
) -> BenchCase:
    computed = rows - rows * (restored or 0) // 8
    pairs = queries * (queries + 1) / 2 if causal else queries * keys
    meta = torch.empty(rows, queries, heads, width, device="meta")
    kind = shape_class(meta, torch.empty(rows, keys, heads, width, device="meta"))
    suffix = "" if restored is None else f", map, {restored}/8 of rows restored"

    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        q, k, v = (torch.randn(rows, n, heads, width, dtype=dtype) for n in (queries, keys, keys))
        source = None
        if restored is not None:
            codes = torch.where(torch.arange(rows) % 8 < restored, ZERO, KEEP).to(torch.int32)
            source = codes[:, None].expand(rows, queries)

        def call(implementation: str) -> Contender:
            return lambda: attention_restore(q, k, v, source, causal=causal, implementation=implementation)

        found = {
            "reference": lambda: reference(q, k, v, source, causal=causal),
            "torch": call("torch"),
            **{name: call(name) for name in ("triton", "triton_padded", "cudnn", "flash")},
        }
        if restored is None:
            found |= sdpa_rivals(q, k, v, causal=causal)
            if kind.endswith("long"):
                found |= {f"triton {blocks}": _with_blocks(q, k, v, blocks) for blocks in CANDIDATES}
        return found

    return BenchCase(
        op="attention_restore",
        shape=f"{name} B={rows}{suffix}",
        shape_class=kind,
        flops=4.0 * computed * heads * pairs * width,
        bytes=2.0 * heads * width * (computed * (queries + 2 * keys) + rows * queries),
        bound="compute" if keys > 128 else "memory",
        contenders=contenders,
    )


def _with_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: tuple[int, int, int, int]) -> Contender:
    def run() -> torch.Tensor:
        from fasttrace.kernels.attention_restore.launch import attention_restore as launch

        return launch(q, k, v, blocks=blocks)

    return run
