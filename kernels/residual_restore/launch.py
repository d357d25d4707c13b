"""Configs and launcher of ``residual_restore``."""

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device, require_adjacent_channels
from .kernel import residual_restore_kernel

# One config for every architecture: whole 128-byte lines of half precision, two vectors a thread and input. Drawing
# noise needs registers, so half as many positions then.
CONFIG = {"BM": 32, "BC": 64, "num_warps": 4}
NOISE_CONFIG = {**CONFIG, "BM": 16}


@on_its_device
def residual_restore(hidden, shortcut, source, bank=None, noise=None, output_scale=1.0, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.residual_restore.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``hidden``, ``shortcut`` or ``bank`` whose channels are not adjacent in memory.
    """
    require_adjacent_channels(hidden=hidden, shortcut=shortcut, bank=bank)
    rows, positions, channels = hidden.shape
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    sigma, seed, mask = noise or (None, None, None)
    tile = tile or (CONFIG if sigma is None else NOISE_CONFIG)
    residual_restore_kernel[(triton.cdiv(rows * positions, tile["BM"]) * triton.cdiv(channels, tile["BC"]),)](
        hidden,
        shortcut,
        source,
        bank,
        None if sigma is None else sigma.contiguous(),
        None if seed is None else seed.contiguous(),
        mask,
        out,
        1.0 / output_scale,
        rows,
        positions,
        *hidden.stride()[:2],
        *shortcut.stride()[:2],
        *source.stride(),
        *((0, 0) if bank is None else bank.stride()[:2]),
        *((0, 0) if mask is None else mask.stride()),
        C=channels,
        **tile,
    )
    return out


# Name, C, dtype, whether noise is drawn.
TRUE_SHAPES = (
    ("sd15_320", 320, "fp16", False),
    ("sdxl_640", 640, "bf16", False),
    ("sd15_320_noise", 320, "fp16", True),
)


def compile_cases():
    """The config at widths of SD1.x and SDXL, with a bank, without and with noise."""
    cases = []
    for arch in ARCHS:
        for name, channels, dtype, noisy in TRUE_SHAPES:
            noise = {"sigma": "*fp32:16", "seed": "*i64:16", "noise_mask": "*i1:16"}
            arguments = {
                **dict.fromkeys(("hidden", "shortcut", "bank", "out"), f"*{dtype}:16"),
                "source": "*i32:16",
                "inverse_scale": "fp32",
                **(noise if noisy else {}),
                **dict.fromkeys(("B", "P", "s_src_b", "s_src_p", "s_mask_b", "s_mask_p"), "i32"),
                **dict.fromkeys(("s_hid_b", "s_hid_p", "s_cut_b", "s_cut_p", "s_bank_s", "s_bank_p"), "i32:16"),
            }
            constants = {"C": channels, **({} if noisy else dict.fromkeys(noise))}
            tile = NOISE_CONFIG if noisy else CONFIG
            cases.append(compile_case(residual_restore_kernel, f"{name}_{dtype}", tile, arch, arguments, constants))
    return cases
