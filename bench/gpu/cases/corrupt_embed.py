"""Embedding a sweep's rows, one to three corrupted tokens each; and the worst case, every token corrupted."""

from __future__ import annotations

import torch

from bench.gpu.case import BenchCase, Contender
from bench.gpu.rivals import compiled, working_dtype
from fasttrace.ops.corrupt_embed import corrupt_embed, reference

# name, rows, tokens, corrupted tokens, width, vocabulary
SHAPES = (
    ("clip_l 1848 rows, 2 corrupted tokens", 1848, 77, 2, 768, 49408),
    ("clip_l 1848 rows, all corrupted", 1848, 77, 77, 768, 49408),
    ("clip_bigg 1848 rows, 2 corrupted tokens", 1848, 77, 2, 1280, 49408),
    ("clip_l 64 rows, 2 corrupted tokens", 64, 77, 2, 768, 49408),
)
TOY_SHAPES = (("toy", 6, 5, 2, 12, 20),)


def cases(toy: bool = False) -> list[BenchCase]:
    return [_case(*shape) for shape in (TOY_SHAPES if toy else SHAPES)]


def _case(name: str, rows: int, tokens: int, corrupted: int, width: int, vocabulary: int) -> BenchCase:
    def contenders() -> dict[str, Contender]:
        dtype = working_dtype()
        table, positions = torch.randn(vocabulary, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
        ids = torch.randint(0, vocabulary, (1, tokens)).expand(rows, tokens)
        mask = (torch.arange(tokens) < corrupted).expand(rows, tokens)
        sigma, seed = torch.full((rows,), 0.3), torch.zeros(rows, dtype=torch.int64)
        arguments = (ids, table, positions, mask, sigma, torch.arange(rows, dtype=torch.int32), seed)
        nothing = torch.zeros(tokens, width, dtype=dtype)
        noise = reference(ids, torch.zeros_like(table), nothing, *arguments[3:])

        def given_noise(ids: torch.Tensor, table: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return table[ids] + noise + positions

        return {
            "reference": lambda: reference(*arguments),
            "torch": lambda: corrupt_embed(*arguments, implementation="torch"),
            "triton": lambda: corrupt_embed(*arguments, implementation="triton"),
            "noise drawn before": lambda: given_noise(ids, table, noise),
            "noise drawn before, compile": compiled(given_noise, ids, table, noise),
        }

    return BenchCase(
        op="corrupt_embed",
        shape=name,
        shape_class=f"d{width}",
        flops=0.0,
        bytes=2.0 * width * tokens * (rows + 2),
        bound="memory",
        contenders=contenders,
    )
