"""Sizes and launcher of ``layer_norm``."""

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device, require_adjacent_channels
from .kernel import layer_norm_kernel

TILE_ELEMENTS = 2048
MAX_CHANNELS = 8192


def sizes(channels):
    """Block sizes from the width alone: about 16 elements a thread, a whole number of positions a program."""
    block_c = triton.next_power_of_2(channels)
    block_m = max(1, TILE_ELEMENTS // block_c)
    return {"BM": block_m, "BC": block_c, "num_warps": max(4, min(16, block_m * block_c // 512))}


@on_its_device
def layer_norm(x, weight=None, bias=None, shift=None, scale=None, eps=1e-5, rms=False, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.layer_norm.reference``.

    ``out`` is for tests; ``tile`` overrides the sizes, for tests and tuning.

    Raises:
        ValueError: fp64, more than ``MAX_CHANNELS`` channels, or channels that are not adjacent in memory.
    """
    require_adjacent_channels(x=x, weight=weight, bias=bias, shift=shift, scale=scale)
    rows, positions, channels = x.shape
    if x.dtype == torch.float64:
        raise ValueError("x is float64: the kernel computes in float32")
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels: the kernel holds at most {MAX_CHANNELS} in registers")
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile or sizes(channels)
    layer_norm_kernel[(triton.cdiv(rows * positions, tile["BM"]),)](
        x,
        weight,
        bias,
        shift,
        scale,
        out,
        rows,
        positions,
        eps,
        *x.stride()[:2],
        0 if shift is None else shift.stride(0),
        0 if scale is None else scale.stride(0),
        C=channels,
        RMS=rms,
        **tile,
    )
    return out


# Name, C, dtype, options, whether the mean is left out: UNets and text encoders, SD3 and FLUX, the widest.
TRUE_SHAPES = (
    ("sd15_320", 320, "fp16", ("weight", "bias"), False),
    ("sd15_1280", 1280, "fp16", ("weight", "bias"), False),
    ("clip_l_768", 768, "fp32", ("weight", "bias"), False),
    ("sd3_1536", 1536, "bf16", ("shift", "scale"), False),
    ("flux_3072", 3072, "bf16", ("shift", "scale"), False),
    ("lumina_2304", 2304, "bf16", ("weight", "scale"), True),
    ("widest_8192", 8192, "fp16", ("shift", "scale"), False),
)


def compile_cases():
    """Every width class, with the options that occur together."""
    cases = []
    for arch in ARCHS:
        for name, channels, dtype, options, rms in TRUE_SHAPES:
            optional = ("weight", "bias", "shift", "scale")
            arguments = {
                **dict.fromkeys(("x", "out", *options), f"*{dtype}:16"),
                **dict.fromkeys(("B", "P"), "i32"),
                "eps": "fp32",
                **dict.fromkeys(("s_x_b", "s_x_p", "s_shift_b", "s_scale_b"), "i32:16"),
            }
            constants = {"C": channels, "RMS": rms, **{n: None for n in optional if n not in options}}
            cases.append(
                compile_case(layer_norm_kernel, f"{name}_{dtype}", sizes(channels), arch, arguments, constants)
            )
    return cases
