"""Sizes and launcher of ``group_norm_silu``."""

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device, require_adjacent_channels
from .kernel import group_norm_silu_kernel, group_norm_silu_stats_kernel

GROUPS_PER_PROGRAM = 8
TILE_ELEMENTS = 4096  # 32 a thread
LAUNCH = {"num_warps": 4}
MIN_ROWS, MAX_CHUNKS = 32, 32


def sizes(positions, channels, groups):
    """Block sizes from a row's shape alone, so that a row's result does not depend on its batch mates.

    A row is cut into at most ``MAX_CHUNKS`` chunks, whose statistics every program of the second stage reads.
    """
    rows = max(MIN_ROWS, triton.next_power_of_2(triton.cdiv(positions, MAX_CHUNKS)))
    block_c = triton.next_power_of_2(GROUPS_PER_PROGRAM * channels // groups)
    block_p = max(1, min(rows, TILE_ELEMENTS // block_c))
    return {"C": channels, "G": groups, "ROWS": rows, "GT": GROUPS_PER_PROGRAM, "BP": block_p, "BC": block_c}


@on_its_device
def group_norm_silu(x, weight, bias, groups, eps=1e-5, silu=True, shift=None, *, out=None):
    """Launch both stages: arguments and result of ``fasttrace.ops.group_norm_silu.reference``. ``out`` is for tests.

    Raises:
        ValueError: ``x`` or ``shift`` whose channels are not adjacent in memory.
    """
    require_adjacent_channels(x=x, shift=shift)
    rows, positions, channels = x.shape
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    blocks = sizes(positions, channels, groups)
    chunks = triton.cdiv(positions, blocks["ROWS"])
    grid = (chunks, triton.cdiv(groups, GROUPS_PER_PROGRAM), rows)
    partial = torch.empty((2, rows, chunks, groups), dtype=torch.float32, device=x.device)
    strides = (*x.stride()[:2], 0 if shift is None else shift.stride(0))
    group_norm_silu_stats_kernel[grid](x, shift, partial, positions, *strides, **blocks, **LAUNCH)
    group_norm_silu_kernel[grid](
        x,
        shift,
        partial,
        weight.contiguous(),
        bias.contiguous(),
        out,
        positions,
        eps,
        *strides,
        **blocks,
        CHUNKS=triton.next_power_of_2(chunks),
        SILU=silu,
        **LAUNCH,
    )
    return out


# Name, P, C, dtype, whether SiLU follows, whether a shift is given.
TRUE_SHAPES = (
    ("sd15_4096x320", 4096, 320, "fp16", True, False),
    ("sd15_4096x320_shift", 4096, 320, "fp16", True, True),
    ("sd15_64x2560", 64, 2560, "bf16", False, False),
    ("sd15_1024x640", 1024, 640, "fp32", True, False),
)


def compile_cases():
    """Both stages at widths of SD1.x and SDXL."""
    cases = []
    for arch in ARCHS:
        for name, positions, channels, dtype, silu, shifted in TRUE_SHAPES:
            blocks = {**sizes(positions, channels, 32), **LAUNCH}
            chunks = triton.next_power_of_2(triton.cdiv(positions, blocks["ROWS"]))
            stats = {"x": f"*{dtype}:16", "partial": "*fp32:16"}
            stats |= dict.fromkeys(("P", "s_x_b", "s_x_p", "s_shift_b"), "i32:16")
            stats |= {"shift": f"*{dtype}:16"} if shifted else {}
            absent = {} if shifted else {"shift": None}
            apply = {**stats, **dict.fromkeys(("weight", "bias", "out"), f"*{dtype}:16"), "eps": "fp32"}
            label, extra = f"{name}_{dtype}", {"CHUNKS": chunks, "SILU": silu, **absent}
            cases.append(compile_case(group_norm_silu_stats_kernel, label, blocks, arch, stats, absent))
            cases.append(compile_case(group_norm_silu_kernel, label, blocks, arch, apply, extra))
    return cases
