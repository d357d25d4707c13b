"""Configs and launcher of ``ragged_prefix_attention``."""

import math

import torch
import triton

from ..aot import CompileCase
from ..configs import on_its_device
from .kernel import ragged_prefix_attention_kernel

# Columns at most: queries a block, keys a block, warps, stages. Suffixes are short, so blocks are small.
CONFIGS = {
    32: (32, 32, 2, 2),
    64: (32, 32, 2, 2),
    128: (32, 32, 4, 2),
}
MAX_HEAD_DIM = 128


def columns(head_dim):
    """Head dimension rounded up to a power of two that a dot takes."""
    return max(16, triton.next_power_of_2(head_dim))


@on_its_device
def ragged_prefix_attention(
    q, k, v, k_base, v_base, cu_seqlens, base=None, key_mask=None, scale=None, *, out=None, blocks=None
):
    """Launch the kernel: arguments and result of ``fasttrace.ops.ragged_prefix_attention.reference``.

    Heads must be adjacent in memory, as a projection leaves them: strides ``(any, d, 1)``, with one more before for the
    base runs. ``out`` is for tests, ``blocks`` (an entry of ``CONFIGS``) for tests and tuning.

    Raises:
        ValueError: a layout or head dimension that the kernel does not take.
    """
    total, heads, head_dim = q.shape
    length, runs = k_base.shape[1], cu_seqlens.shape[0] - 1
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_base", k_base), ("v_base", v_base)):
        if tensor.stride()[-2:] != (head_dim, 1):
            raise ValueError(f"{name} has strides {tensor.stride()}: heads must be adjacent, (..., {head_dim}, 1)")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dimension {head_dim}: the kernel takes at most {MAX_HEAD_DIM}")
    if out is None:
        out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    block_m, block_n, warps, stages = blocks or CONFIGS[next(c for c in CONFIGS if columns(head_dim) <= c)]
    ragged_prefix_attention_kernel[(triton.cdiv(length, block_m) * heads * runs,)](
        out,
        q,
        k,
        v,
        k_base,
        v_base,
        cu_seqlens,
        base,
        key_mask,
        length,
        heads,
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        *k_base.stride()[:2],
        *v_base.stride()[:2],
        *((0, 0) if key_mask is None else key_mask.stride()),
        D=head_dim,
        BD=columns(head_dim),
        BM=block_m,
        BN=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _case(name, head_dim, dtype, given):
    block_m, block_n, warps, stages = CONFIGS[next(c for c in CONFIGS if columns(head_dim) <= c)]
    optional = {"base": "*i32:16", "key_mask": "*i1:16"}
    return CompileCase(
        kernel="ragged_prefix_attention",
        config=name,
        function=ragged_prefix_attention_kernel,
        arguments={
            **dict.fromkeys(("out", "q", "k", "v", "k_base", "v_base"), f"*{dtype}:16"),
            **dict.fromkeys(("s_q", "s_k", "s_v", "s_kg", "s_kt", "s_vg", "s_vt"), "i32:16"),
            **dict.fromkeys(("T", "H", "s_mg", "s_mt"), "i32"),
            **{n: optional[n] for n in given},
            "cu_seqlens": "*i32:16",
            "scale": "fp32",
        },
        constants={
            **{n: None for n in optional if n not in given},
            "D": head_dim,
            "BD": columns(head_dim),
            "BM": block_m,
            "BN": block_n,
        },
        num_warps=warps,
        num_stages=stages,
        has_dot=True,
    )


def compile_cases():
    """Every config with several base runs; CLIP's head also in bf16, with one base run and with masked keys."""
    return [
        _case("hd32_fp16", 32, "fp16", ("base",)),
        _case("hd64_fp16", 64, "fp16", ("base",)),
        _case("hd128_fp16", 128, "fp16", ("base",)),
        _case("hd64_bf16_one_base", 64, "bf16", ()),
        _case("hd64_fp16_masked", 64, "fp16", ("base", "key_mask")),
    ]
