"""One layer of a text sweep: every run patched at one token, at CLIP-L, OpenCLIP-H and OpenCLIP-bigG."""

from __future__ import annotations

import torch

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.ragged_prefix_attention import padded_sdpa, ragged_prefix_attention, reference

# name, runs a token, tokens, heads, head dimension
SHAPES = (
    ("clip_l 1848 runs", 24, 77, 12, 64),
    ("clip_h 1848 runs", 24, 77, 16, 64),
    ("clip_bigg 1848 runs", 24, 77, 20, 64),
    ("clip_l 154 runs", 2, 77, 12, 64),
)
TOY_SHAPES = (("toy", 2, 9, 2, 16),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, runs_a_token: int, tokens: int, heads: int, width: int) -> BenchCase:
    lengths = torch.arange(1, tokens + 1, device="cpu").repeat_interleave(runs_a_token)
    total = int(lengths.sum())
    pairs = int((lengths * tokens - lengths * (lengths - 1) // 2).sum())

    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        q, k, v = (torch.randn(total, heads, width, dtype=dtype) for _ in range(3))
        k_base, v_base = (torch.randn(1, tokens, heads, width, dtype=dtype) for _ in range(2))
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(q.device, torch.int32)
        arguments = (q, k, v, k_base, v_base, bounds)
        return {
            "reference": lambda: reference(*arguments),
            "torch": lambda: padded_sdpa(*arguments),
            "triton": lambda: ragged_prefix_attention(*arguments, implementation="triton"),
            "compile": compiled(padded_sdpa, *arguments),
        }

    return BenchCase(
        op="ragged_prefix_attention",
        shape=f"{name}, {total} live tokens",
        shape_class=f"hd{width}",
        flops=4.0 * pairs * heads * width,
        bytes=8.0 * total * heads * width,
        bound="memory",
        contenders=contenders,
    )
