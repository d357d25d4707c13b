"""Configs and launcher of ``rank_update``."""

from functools import lru_cache

import torch
import triton

from ..configs import ARCHS, compile_case, on_its_device, require_adjacent_channels
from .kernel import rank_update_kernel

# Tile for every architecture: 32 elements a thread, so that four vectors of half precision are in flight; a quarter of
# it where rows are not whole vectors, since every element then needs an address of its own.
CONFIGS = {
    "aligned": {"BM": 32, "BN": 128, "num_warps": 4},
    "unaligned": {"BM": 16, "BN": 64, "num_warps": 4},
}

# Rows of the table that the kernel reads; strides are in elements. The last one counts the tiles before a matrix.
FIELDS = (
    *("weight", "out", "left", "right", "rows", "columns", "rank"),
    *("s_weight", "s_out", "s_left_n", "s_left_r", "s_right_k", "s_right_r", "first_tile"),
)


@on_its_device
def rank_update(weights, left, right, out, *, tile=None):
    """Launch the kernel: arguments of ``fasttrace.ops.rank_update.reference``, which says what goes to ``out``.

    ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: tensors of several devices, matrices of several dtypes, fp64, rows that are not contiguous, or a
            first call with these tensors inside a graph capture, which cannot hold the copy of their table.
    """
    devices = {t.device for t in (*weights, *out, *left, *right)}
    if len(devices) > 1:
        raise ValueError(f"tensors on {', '.join(sorted(map(str, devices)))}: one launch reads pointers of one device")
    kinds = {(t.dtype, t.device) for t in (*weights, *out)}
    if len(kinds) > 1 or torch.float64 in (t.dtype for t in weights):
        raise ValueError(f"weights {sorted(map(str, kinds))}: one launch takes one dtype, at most fp32, on one device")
    if len({t.dtype for t in (*left, *right)}) > 1:
        left, right = [a.float() for a in left], [b.float() for b in right]
    matrices = [m for m in zip(weights, left, right, out, strict=True) if m[0].numel()]
    for w, _, _, o in matrices:
        require_adjacent_channels(weight=w, out=o)
    aligned = all(_whole_vectors(w, o) for w, _, _, o in matrices)
    tile = tile or CONFIGS["aligned" if aligned else "unaligned"]

    columns, first_tile = [], 0
    for w, a, b, o in matrices:
        pointers = (w.data_ptr(), o.data_ptr(), a.data_ptr(), b.data_ptr())
        strides = (w.stride(0), o.stride(0), *a.stride(), *b.stride())
        columns.append((*pointers, *w.shape, a.shape[1], *strides, first_tile))
        first_tile += triton.cdiv(w.shape[0], tile["BM"]) * triton.cdiv(w.shape[1], tile["BN"])
    if columns:
        rank_update_kernel[(first_tile,)](
            _table(tuple(columns), weights[0].device),
            weights[0],
            left[0],
            len(columns),
            BT=triton.next_power_of_2(len(columns)),
            ALIGNED=aligned,
            **tile,
        )


def _whole_vectors(weight, out):
    pointers = (weight.data_ptr() // weight.element_size(), out.data_ptr() // out.element_size())
    return all(n % 16 == 0 for n in (*pointers, weight.shape[1], weight.stride(0), out.stride(0)))


@lru_cache(maxsize=16)
def _table(columns, device):
    """The table on the device: the same tensors edited again need no second copy."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("the table of these matrices is not on the device yet: call once before the graph is captured")
    return torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device)


def compile_cases():
    """Every config: one matrix, all 32 cross-attention matrices of SD1.x, all 140 of SDXL, in every storage type."""
    return [
        compile_case(
            rank_update_kernel,
            f"{matrices}_{key}_{dtype}",
            CONFIGS[key],
            arch,
            {"table": "*i64:16", "weight_type": f"*{dtype}:16", "factor_type": "*fp32:16", "M": "i32"},
            {"BT": triton.next_power_of_2(matrices), "ALIGNED": key == "aligned"},
        )
        for arch in ARCHS
        for matrices, key, dtype in (
            (1, "aligned", "fp32"),
            (32, "aligned", "fp16"),
            (140, "aligned", "bf16"),
            (1, "unaligned", "fp16"),
        )
    ]
