"""Configs and launchers of the epilogue: ``epilogue`` itself, and ``residual_restore``, which is one."""

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device, require_adjacent_channels
from .kernel import epilogue_kernel

# One config for every architecture: whole 128-byte lines of half precision, two vectors a thread and input. Drawing
# noise needs registers, so half as many positions then.
CONFIG = {"BM": 32, "BC": 64, "num_warps": 4}
NOISE_CONFIG = {**CONFIG, "BM": 16}


@on_its_device
def epilogue(
    hidden,
    source,
    bank=None,
    noise=None,
    *,
    bias=None,
    shortcut=None,
    output_scale=1.0,
    gate=None,
    residual=None,
    out=None,
    tile=None,
):
    """``gate * (restore((hidden + bias + shortcut) / output_scale) + noise) + residual``, each part optional.

    The arguments are those of ``fasttrace.ops.residual_restore`` and ``fasttrace.ops.linear_restore``. ``out`` is for
    tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: fp64, or a value whose channels are not adjacent in memory.
    """
    require_adjacent_channels(hidden=hidden, shortcut=shortcut, bank=bank, gate=gate, residual=residual)
    if hidden.dtype == torch.float64:
        raise ValueError("hidden is float64: the kernel computes in float32")
    rows, positions, channels = hidden.shape
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    sigma, seed, mask = noise or (None, None, None)
    tile = tile or (CONFIG if sigma is None else NOISE_CONFIG)
    epilogue_kernel[(triton.cdiv(rows * positions, tile["BM"]) * triton.cdiv(channels, tile["BC"]),)](
        hidden,
        bias,
        shortcut,
        source,
        bank,
        None if sigma is None else sigma.contiguous(),
        None if seed is None else seed.contiguous(),
        mask,
        gate,
        residual,
        out,
        1.0 / output_scale,
        rows,
        positions,
        *hidden.stride()[:2],
        *_strides(shortcut),
        *source.stride(),
        *_strides(bank),
        *_strides(mask),
        *_strides(gate)[:1],
        *_strides(residual),
        C=channels,
        **tile,
    )
    return out


def residual_restore(
    hidden, shortcut, source, bank=None, noise=None, output_scale=1.0, bias=None, *, out=None, tile=None
):
    """Arguments and result of ``fasttrace.ops.residual_restore.reference``; the rest is as `epilogue` says."""
    given = {"bias": bias, "shortcut": shortcut, "output_scale": output_scale}
    return epilogue(hidden, source, bank, noise, **given, out=out, tile=tile)


def _strides(tensor):
    return (0, 0) if tensor is None else tensor.stride()[:2]


# Name, C, dtype, options: a resnet's end in both forms, and a projection's end after a library's product.
TRUE_SHAPES = (
    ("sd15_320_resnet", 320, "fp16", ("bias", "shortcut", "bank")),
    ("sdxl_640_resnet", 640, "bf16", ("bias", "shortcut", "bank")),
    ("sd15_320_resnet_noise", 320, "fp16", ("shortcut", "bank", "noise")),
    ("sd15_640_linear", 640, "fp16", ("residual", "bank")),
    ("sd3_1536_linear_gated", 1536, "bf16", ("gate", "residual", "bank")),
)


def compile_cases():
    """The configs at widths of SD1.x, SDXL and SD3, with the options that occur together."""
    cases = []
    for arch in ARCHS:
        for name, channels, dtype, options in TRUE_SHAPES:
            optional = {
                **{option: {option: f"*{dtype}:16"} for option in ("bias", "shortcut", "bank", "gate", "residual")},
                "noise": {"sigma": "*fp32:16", "seed": "*i64:16", "noise_mask": "*i1:16"},
            }
            given = {n: kind for option in options for n, kind in optional[option].items()}
            wide = ("hid_b", "hid_p", "cut_b", "cut_p", "bank_s", "bank_p", "gate_b", "res_b", "res_p")
            arguments = {
                **dict.fromkeys(("hidden", "out"), f"*{dtype}:16"),
                "source": "*i32:16",
                "inverse_scale": "fp32",
                **given,
                **dict.fromkeys(("B", "P", "s_src_b", "s_src_p", "s_mask_b", "s_mask_p"), "i32"),
                **{f"s_{stride}": "i32:16" for stride in wide},
            }
            constants = {"C": channels, **{n: None for kinds in optional.values() for n in kinds if n not in given}}
            tile = NOISE_CONFIG if "noise" in options else CONFIG
            cases.append(compile_case(epilogue_kernel, f"{name}_{dtype}", tile, arch, arguments, constants))
    return cases
