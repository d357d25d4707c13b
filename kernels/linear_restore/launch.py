"""Configs and launcher of ``linear_restore``."""

import torch
import triton

from ..configs import ARCHS, arch_of, compile_case, config, on_its_device, require_adjacent_channels
from .kernel import linear_restore_kernel

# Tile and pipeline by (architecture, size class).
CONFIGS = {
    (80, "few"): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    (80, "narrow"): {"BM": 128, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    (80, "wide"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    (80, "noise"): {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
    (80, "fp32"): {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    (90, "wide"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
}
FEW_POSITIONS = 4096
NARROW = 320


def size_class(positions, channels, dtype, noisy=False):
    """Which config a call takes: ``positions`` is B * P, ``channels`` the width of the result.

    Drawing noise needs so many registers that the large tiles would spill.
    """
    if dtype == torch.float32:
        return "fp32"
    if noisy:
        return "noise"
    if positions < FEW_POSITIONS:
        return "few"
    return "narrow" if channels <= NARROW else "wide"


def rank_block(rank):
    return max(16, triton.next_power_of_2(rank))


@on_its_device
def linear_restore(
    x, weight, bias, residual, source, bank=None, noise=None, low_rank=None, gate=None, *, out=None, tile=None
):
    """Launch the kernel: arguments and result of ``fasttrace.ops.linear_restore.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x``, ``residual``, ``bank`` or ``gate`` whose channels are not adjacent in memory.
    """
    require_adjacent_channels(x=x, residual=residual, bank=bank, gate=gate)
    rows, positions, width = x.shape
    channels = weight.shape[0]
    if out is None:
        out = torch.empty((rows, positions, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sigma, seed, mask = noise or (None, None, None)
    edit_x, edit_u = low_rank or (None, None)
    rank = edit_x.shape[2] if low_rank else 0
    tile = tile or config(CONFIGS, arch_of(x), size_class(rows * positions, channels, x.dtype, sigma is not None))
    linear_restore_kernel[(triton.cdiv(rows * positions, tile["BM"]) * triton.cdiv(channels, tile["BN"]),)](
        x,
        weight.contiguous(),
        bias,
        gate,
        residual,
        source,
        bank,
        None if sigma is None else sigma.contiguous(),
        None if seed is None else seed.contiguous(),
        mask,
        None if edit_x is None else edit_x.contiguous(),
        None if edit_u is None else edit_u.contiguous(),
        out,
        rows,
        positions,
        *x.stride()[:2],
        0 if gate is None else gate.stride(0),
        *((0, 0) if residual is None else residual.stride()[:2]),
        *source.stride(),
        *((0, 0) if bank is None else bank.stride()[:2]),
        *((0, 0) if mask is None else mask.stride()),
        N=channels,
        K=width,
        RANK=rank,
        BR=rank_block(rank),
        **tile,
    )
    return out


# Name, size class, N, K, dtype, options: true shapes of every config.
TRUE_SHAPES = (
    ("sd15_320_attn", "narrow", 320, 320, "fp16", ("residual", "bank")),
    ("sd15_1280_mlp", "wide", 1280, 5120, "fp16", ("residual", "bank")),
    ("sdxl_640_attn", "wide", 640, 640, "bf16", ("residual", "bank")),
    ("sd3_1536_attn", "wide", 1536, 1536, "bf16", ("residual", "bank", "gate")),
    ("clip_l_mlp", "few", 768, 3072, "fp16", ("residual", "bank", "low_rank")),
    ("sd15_640_noise", "noise", 640, 640, "fp16", ("residual", "bank", "noise", "low_rank")),
    ("clip_l_attn", "fp32", 768, 768, "fp32", ("residual", "bank", "noise", "low_rank")),
)


def compile_cases():
    """Every config at true shapes, with and without each option."""
    cases = []
    for arch in ARCHS:
        for name, key, channels, width, dtype, options in TRUE_SHAPES:
            optional = {
                "residual": {"residual": f"*{dtype}:16"},
                "gate": {"gate": f"*{dtype}:16"},
                "bank": {"bank": f"*{dtype}:16"},
                "noise": {"sigma": "*fp32:16", "seed": "*i64:16", "noise_mask": "*i1:16"},
                "low_rank": {"edit_x": f"*{dtype}:16", "edit_u": f"*{dtype}:16"},
            }
            given = {n: kind for option in options for n, kind in optional[option].items()}
            wide = ("s_x_b", "s_x_p", "s_gate_b", "s_res_b", "s_res_p", "s_bank_s", "s_bank_p")
            arguments = {
                **dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}:16"),
                "source": "*i32:16",
                **given,
                **dict.fromkeys(("B", "P", "s_src_b", "s_src_p", "s_mask_b", "s_mask_p"), "i32"),
                **dict.fromkeys(wide, "i32:16"),
            }
            rank = 16 if "low_rank" in options else 0
            constants = {"N": channels, "K": width, "RANK": rank, "BR": rank_block(rank)}
            constants |= {n: None for kinds in optional.values() for n in kinds if n not in given}
            cases.append(
                compile_case(
                    linear_restore_kernel,
                    f"{name}_{dtype}",
                    config(CONFIGS, arch, key),
                    arch,
                    arguments,
                    constants,
                    has_dot=dtype != "fp32",
                )
            )
    return cases
