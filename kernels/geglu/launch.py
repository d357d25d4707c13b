"""Configs and launcher of ``geglu``."""

import torch
import triton

from ..configs import ARCHS, arch_of, compile_case, config, require_adjacent_channels
from .kernel import geglu_kernel

# Tile and pipeline by (architecture, size class).
CONFIGS = {
    (80, "few"): {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 4},
    (80, "many"): {"BM": 128, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 4},
    (80, "fp32"): {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    (90, "few"): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    (90, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
FEW_POSITIONS = 1024


def size_class(positions, dtype):
    """Which config a call takes: ``positions`` is B * P."""
    if dtype == torch.float32:
        return "fp32"
    return "few" if positions < FEW_POSITIONS else "many"


def geglu(x, weight, bias, source=None, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.geglu.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    require_adjacent_channels(x=x)
    rows, positions, width = x.shape
    channels = weight.shape[0] // 2
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile or config(CONFIGS, arch_of(x), size_class(rows * positions, x.dtype))
    geglu_kernel[(triton.cdiv(rows * positions, tile["BM"]) * triton.cdiv(channels, tile["BN"]),)](
        x,
        weight.contiguous(),
        bias,
        source,
        out,
        rows,
        positions,
        *x.stride()[:2],
        *((0, 0) if source is None else source.stride()),
        F=channels,
        K=width,
        **tile,
    )
    return out


# Name, size class, F, K, dtype, whether a source map is given.
TRUE_SHAPES = (
    ("sd15_320", "many", 1280, 320, "fp16", True),
    ("sdxl_640", "many", 2560, 640, "bf16", False),
    ("sd15_1280", "few", 5120, 1280, "fp16", True),
    ("sd15_320", "fp32", 1280, 320, "fp32", True),
)


def compile_cases():
    """Every config at widths of SD1.x and SDXL."""
    cases = []
    for arch in ARCHS:
        for name, key, channels, width, dtype, mapped in TRUE_SHAPES:
            arguments = {
                **dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}:16"),
                **({"source": "*i32:16"} if mapped else {}),
                **dict.fromkeys(("B", "P", "s_src_b", "s_src_p"), "i32"),
                **dict.fromkeys(("s_x_b", "s_x_p"), "i32:16"),
            }
            constants = {"F": channels, "K": width, **({} if mapped else {"source": None})}
            tile, label = config(CONFIGS, arch, key), f"{name}_{key}_{dtype}"
            cases.append(compile_case(geglu_kernel, label, tile, arch, arguments, constants, has_dot=dtype != "fp32"))
    return cases
