"""Sizes and launcher of ``head_rotary``."""

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device
from .kernel import head_rotary_kernel

TILE_ELEMENTS = 2048
MAX_HEAD_DIM = 256


def sizes(head_dim):
    """Block sizes from the head's width alone: 16 elements a thread."""
    block_d = triton.next_power_of_2(head_dim)
    return {"BM": max(1, TILE_ELEMENTS // block_d), "BD": block_d, "num_warps": 4}


@on_its_device
def head_rotary(x, weight=None, cos=None, sin=None, eps=1e-6, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.head_rotary.reference``.

    Heads must be adjacent in memory, as a projection leaves them: strides ``(any, any, d, 1)``. ``out`` is for tests;
    ``tile`` overrides the sizes, for tests and tuning.

    Raises:
        ValueError: fp64, a wider head than ``MAX_HEAD_DIM``, or a layout that the kernel does not take.
    """
    rows, positions, heads, head_dim = x.shape
    if x.stride()[2:] != (head_dim, 1):
        raise ValueError(f"x has strides {x.stride()}: heads must be adjacent, (any, any, {head_dim}, 1)")
    if x.dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"x is {x.dtype} with heads of {head_dim}: the kernel takes fp32 and heads of {MAX_HEAD_DIM}")
    if out is None:
        out = torch.empty((rows, positions, heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile or sizes(head_dim)
    total = rows * positions * heads
    head_rotary_kernel[(triton.cdiv(total, tile["BM"]),)](
        x,
        weight,
        None if cos is None else cos.float().contiguous(),
        None if sin is None else sin.float().contiguous(),
        out,
        total,
        positions,
        heads,
        eps,
        *x.stride()[:2],
        D=head_dim,
        **tile,
    )
    return out


# Name, head dimension, dtype, options.
TRUE_SHAPES = (
    ("sd35_64", 64, "bf16", ("weight",)),
    ("flux_128", 128, "bf16", ("weight", "cos", "sin")),
    ("lumina_96", 96, "bf16", ("weight", "cos", "sin")),
    ("rotary_alone_64", 64, "fp32", ("cos", "sin")),
)


def compile_cases():
    """Heads of SD3.5, FLUX and Lumina 2."""
    cases = []
    for arch in ARCHS:
        for name, head_dim, dtype, options in TRUE_SHAPES:
            optional = {"weight": f"*{dtype}:16", "cos": "*fp32:16", "sin": "*fp32:16"}
            arguments = {
                **dict.fromkeys(("x", "out"), f"*{dtype}:16"),
                **{n: optional[n] for n in options},
                **dict.fromkeys(("total", "P", "H"), "i32"),
                "eps": "fp32",
                **dict.fromkeys(("s_x_b", "s_x_p"), "i32:16"),
            }
            constants = {"D": head_dim, **{n: None for n in optional if n not in options}}
            label = f"{name}_{dtype}"
            cases.append(compile_case(head_rotary_kernel, label, sizes(head_dim), arch, arguments, constants))
    return cases
