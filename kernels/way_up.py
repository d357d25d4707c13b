"""Launching the way up of an MLP: what ``geglu``, ``gelu_up`` and ``quick_gelu`` share but for the activation."""

import torch
import triton

from .configs import ARCHS, arch_of, compile_case, config, require_adjacent_channels

FEW_POSITIONS = 1024


def size_class(positions, dtype):
    """Which config a call takes: ``positions`` is B * P."""
    if dtype == torch.float32:
        return "fp32"
    return "few" if positions < FEW_POSITIONS else "many"


def launch_way_up(kernel, configs, channels, x, weight, bias, source, out, tile, **constants):
    """Launch ``kernel`` over tiles of positions by output ``channels``; ``out`` and ``tile`` may be ``None``.

    ``constants`` are the kernel's own.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    require_adjacent_channels(x=x)
    rows, positions, width = x.shape
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile or config(configs, arch_of(x), size_class(rows * positions, x.dtype))
    kernel[(triton.cdiv(rows * positions, tile["BM"]) * triton.cdiv(channels, tile["BN"]),)](
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
        **constants,
        **tile,
    )
    return out


def way_up_cases(kernel, configs, shapes, **own):
    """The ``CompileCase`` of every config at the shapes: name, size class, F, K, dtype, whether there is a source."""
    cases = []
    for arch in ARCHS:
        for name, key, channels, width, dtype, mapped in shapes:
            arguments = {
                **dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}:16"),
                **({"source": "*i32:16"} if mapped else {}),
                **dict.fromkeys(("B", "P", "s_src_b", "s_src_p"), "i32"),
                **dict.fromkeys(("s_x_b", "s_x_p"), "i32:16"),
            }
            constants = {"F": channels, "K": width, **own, **({} if mapped else {"source": None})}
            tile, label = config(configs, arch, key), "_".join((name, key, dtype, *own.values()))
            cases.append(compile_case(kernel, label, tile, arch, arguments, constants, has_dot=dtype != "fp32"))
    return cases
