"""Every way to attend equals the formula, run by run, on lengths that are no whole number of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttrace.engine.text.attention import suffix_attention
from fasttrace.engine.text.plan import Suffixes
from fasttrace.models.text.description import Heads

FIRST = [0, 0, 5, 16, 16, 16, 33, 44, 44]
LENGTH, HEADS, WIDTH = 45, 4, 6


def suffixes_of(first: list[int]) -> Suffixes:
    groups = [(start, first.count(start), LENGTH - start) for start in sorted(set(first))]
    tokens = torch.cat([torch.arange(start, LENGTH) for start in first])
    bounds = torch.tensor([0, *(LENGTH - start for start in first)]).cumsum(0).int()
    return Suffixes(groups, tokens, bounds)


def expected(own: Heads, base: Heads, first: list[int], bias: Tensor, scale: float) -> Tensor:
    results, row = [], 0
    for start in first:
        rows = slice(row, row + LENGTH - start)
        keys, values = (
            torch.cat([shared[:start], x[rows]]).repeat_interleave(HEADS // x.shape[1], dim=1)
            for shared, x in zip(base[1:], own[1:], strict=True)
        )
        scores = torch.einsum("qhd,khd->hqk", own[0][rows], keys) * scale
        if bias.dtype == torch.bool:
            weights = scores.masked_fill(~bias[:, start:], float("-inf")).softmax(-1).nan_to_num(0.0)
        else:
            weights = (scores + bias[:, start:]).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, values))
        row = rows.stop
    return torch.cat(results)


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize(
    ("way", "bias"),
    [(way, bias) for way in ("grouped", "ragged") for bias in ("causal", "masked", "blind")] + [("grouped", "added")],
)
def test_ways(way: str, bias: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first = [0] if bias == "added" else FIRST
    suffixes = suffixes_of(first)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own, base = (
        (drawn(n, HEADS, WIDTH), drawn(n, groups, WIDTH), drawn(n, groups, WIDTH))
        for n in (len(suffixes.tokens), LENGTH)
    )
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if bias in ("masked", "blind"):
        allowed[:, [20, 40] if bias == "masked" else [0, 1, 2]] = False
    scores = drawn(HEADS, LENGTH, LENGTH) if bias == "added" else allowed[None]
    attend = suffix_attention(way, scores, bias != "added", own[0])
    out = torch.full_like(own[0], float("nan"))
    attend(own, base, suffixes, 0.3, out)
    torch.testing.assert_close(out, expected(own, base, first, scores, 0.3), rtol=1e-12, atol=1e-12)
