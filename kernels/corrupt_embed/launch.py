"""Configs and launcher of ``corrupt_embed``."""

import torch
import triton

from ..aot import CompileCase
from ..configs import on_its_device
from .kernel import corrupt_embed_kernel

# One config for every architecture and width: rows and channels a program, warps.
CONFIG = {"BR": 4, "BD": 256, "num_warps": 4}


@on_its_device
def corrupt_embed(ids, table, positions, mask, sigma, sample, seed, *, out=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.corrupt_embed.reference``.

    ``table`` and ``positions`` must be contiguous. ``out`` is for tests.
    """
    rows, length = ids.shape
    width = table.shape[1]
    if out is None:
        out = torch.empty((rows, length, width), dtype=table.dtype, device=table.device)
    grid = (length * triton.cdiv(rows, CONFIG["BR"]), triton.cdiv(width, CONFIG["BD"]))
    if rows and length:
        corrupt_embed_kernel[grid](
            out,
            ids,
            table.contiguous(),
            positions.contiguous(),
            mask,
            sigma,
            sample,
            seed,
            rows,
            length,
            *ids.stride(),
            *mask.stride(),
            sigma.stride(0),
            sample.stride(0),
            seed.stride(0),
            D=width,
            **CONFIG,
        )
    return out


def compile_cases():
    """CLIP-L, and the wider OpenCLIP encoders of SD2.x and SDXL; each dtype once."""
    strides = {f"s_{name}": "i32" for name in ("ids_r", "ids_t", "mask_r", "mask_t", "sigma", "sample", "seed")}
    return [
        CompileCase(
            kernel="corrupt_embed",
            config=f"{name}_{dtype}",
            function=corrupt_embed_kernel,
            arguments={
                "out": f"*{dtype}:16",
                "ids": "*i64:16",
                "table": f"*{dtype}:16",
                "positions": f"*{dtype}:16",
                "mask": "*i1:16",
                "sigma": "*fp32:16",
                "sample": "*i32:16",
                "seed": "*i64:16",
                "R": "i32",
                "T": "i32",
                **strides,
            },
            constants={"D": width, "BR": CONFIG["BR"], "BD": CONFIG["BD"]},
            num_warps=CONFIG["num_warps"],
        )
        for name, width, dtype in (("clip_l", 768, "fp16"), ("clip_h", 1024, "bf16"), ("clip_bigg", 1280, "fp32"))
    ]
