"""Philox in Triton against the numpy reference: the words bit for bit, the normals to fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttrace.corruption import philox4x32, philox_normal

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
import triton.language as tl  # noqa: E402
from fasttrace.kernels import common  # noqa: E402

LARGE_SEED = (0xFEDCBA98 << 32) | 0x76543210


@triton.jit
def words_kernel(out, counters, seed, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    c0 = tl.load(counters + o_n)
    c1 = tl.load(counters + BLOCK + o_n)
    c2 = tl.load(counters + 2 * BLOCK + o_n)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    tl.store(out + o_n, w0.to(tl.int64))
    tl.store(out + BLOCK + o_n, w1.to(tl.int64))
    tl.store(out + 2 * BLOCK + o_n, w2.to(tl.int64))
    tl.store(out + 3 * BLOCK + o_n, w3.to(tl.int64))


@triton.jit
def normals_kernel(out, seed, samples, tokens, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    o_r = tl.arange(0, ROWS)[:, None]
    b_n = common.philox_normal(seed, tl.load(samples + o_r), tl.load(tokens + o_r), first, BLOCK_D)
    tl.store(out + o_r * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], b_n)


@pytest.mark.parametrize("seed", [0, 1, 2**31, LARGE_SEED - 2**64])
def test_words_are_those_of_philox4x32_bit_for_bit(seed, device, guarded):
    counters = torch.tensor([[0, 1, 2, 76, 1279, 5, 2**31 - 1, 40]] * 3, dtype=torch.int32)
    counters[1], counters[2] = counters[0].flip(0), counters[0].roll(3)
    out = guarded((4, 8), torch.int64)
    words_kernel[(1,)](out, guarded(counters), seed, 8)
    expected = philox4x32(seed % 2**64, *counters.numpy().astype(np.uint64), np.zeros(8, np.uint64))
    assert torch.equal(out.cpu(), torch.from_numpy(np.stack(expected).astype(np.int64)))


@pytest.mark.parametrize("first", [0, 64, 1276])
def test_normals_are_those_of_the_corruption(first, device, guarded):
    samples, tokens = [0, 3, 3, 900], [1, 1, 76, 0]
    out = guarded((4, 16))
    column = {"dtype": torch.int32}
    args = guarded(torch.tensor(samples, **column)), guarded(torch.tensor(tokens, **column))
    normals_kernel[(1,)](out, LARGE_SEED - 2**64, *args, first, 4, 16)
    rows = [philox_normal(LARGE_SEED, s, [t], first + 16)[0, first:] for s, t in zip(samples, tokens, strict=True)]
    assert (out.cpu() - torch.stack(rows)).abs().max() < 3e-6
