"""Configs and launcher of ``attention_restore``."""

import math

import torch
import triton

from ..aot import CompileCase
from ..configs import arch_of, on_its_device
from .kernel import attention_restore_kernel

MAX_HEAD_DIM = 160

# (architecture, columns at most, kind): queries a block, keys a block, warps, stages. A device takes the nearest
# architecture at or below its own. Columns are those of the split head: 48 for 40, 80, 160. Kinds are the lengths of
# the op's shape classes, and "heads" for any length with head values to restore.
CONFIGS = {
    (80, 64, "long"): (128, 32, 4, 4),
    (80, 64, "cross"): (128, 32, 4, 2),
    (80, 64, "text"): (64, 32, 4, 2),
    (80, 64, "heads"): (64, 16, 4, 2),
    (80, 128, "long"): (64, 64, 4, 2),
    (80, 128, "cross"): (64, 32, 4, 2),
    (80, 128, "text"): (64, 32, 4, 2),
    (80, 128, "heads"): (64, 32, 4, 2),
    (80, 256, "long"): (64, 16, 4, 2),
    (80, 256, "cross"): (64, 16, 4, 2),
    (80, 256, "text"): (64, 16, 4, 2),
    (80, 256, "heads"): (64, 16, 8, 2),
    (90, 64, "long"): (128, 64, 8, 3),
    (90, 64, "cross"): (128, 32, 4, 2),
    (90, 64, "text"): (64, 32, 4, 2),
    (90, 64, "heads"): (64, 32, 4, 2),
    (90, 128, "long"): (128, 64, 8, 3),
    (90, 128, "cross"): (128, 32, 4, 2),
    (90, 128, "text"): (64, 32, 4, 2),
    (90, 128, "heads"): (64, 32, 4, 2),
    (90, 256, "long"): (128, 64, 8, 2),
    (90, 256, "cross"): (64, 32, 4, 2),
    (90, 256, "text"): (64, 32, 4, 2),
    (90, 256, "heads"): (64, 16, 8, 2),
}


def split(head_dim):
    """Columns ``(D0, D1)`` that cover a head: powers of two for the dot, 40 -> 32 + 16 rather than 64."""
    whole = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - whole)
    part = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * whole, 0) if part >= whole else (whole, part)


def config(arch, head_dim, queries, keys, head_values):
    """Blocks, warps and stages for an architecture (80, 90, ...) and shape."""
    kind = "heads" if head_values else "long" if keys > 128 else "cross" if queries > 128 else "text"
    columns = next(c for c in (64, 128, 256) if sum(split(head_dim)) <= c)
    return CONFIGS[90 if arch >= 90 else 80, columns, kind]


@on_its_device
def attention_restore(
    q,
    k,
    v,
    source=None,
    head_source=None,
    bank=None,
    kv_row=None,
    kv_length=None,
    causal=False,
    scale=None,
    more_k=None,
    more_v=None,
    *,
    out=None,
    blocks=None,
    columns=None,
):
    """Launch the kernel: arguments and result of ``fasttrace.ops.attention_restore.reference``.

    Heads must be adjacent in memory, as a projection leaves them: strides ``(any, any, d, 1)`` for ``q``, ``k`` and
    ``v`` and their second segments, and contiguous ``d`` for ``bank``. ``out`` is for tests, ``blocks`` (an entry of
    ``CONFIGS``) and ``columns`` (``split`` by default) for tests and tuning.

    Raises:
        ValueError: a layout or head dimension that the kernel does not take.
    """
    rows, queries, heads, head_dim = q.shape
    keys, more = k.shape[1], 0 if more_k is None else more_k.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v), ("more_k", more_k), ("more_v", more_v)):
        if tensor is not None and tensor.stride()[2:] != (head_dim, 1):
            raise ValueError(f"{name} has strides {tensor.stride()}: heads must be adjacent, (any, any, {head_dim}, 1)")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dimension {head_dim}: the kernel takes at most {MAX_HEAD_DIM}")
    if out is None:
        out = torch.empty((rows, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if blocks is None:
        blocks = config(arch_of(q), head_dim, queries, keys + more, head_source is not None)
    block_m, block_n, warps, stages = blocks
    columns, rest = columns or split(head_dim)
    none = (0, 0, 0)
    attention_restore_kernel[(triton.cdiv(queries, block_m) * heads * rows,)](
        out,
        q,
        k,
        v,
        more_k,
        more_v,
        source,
        head_source,
        bank,
        kv_row,
        kv_length,
        rows,
        queries,
        keys,
        more,
        heads,
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *(none[:2] if more_k is None else more_k.stride()[:2]),
        *(none[:2] if more_v is None else more_v.stride()[:2]),
        *(none[:2] if source is None else source.stride()),
        *(none if head_source is None else head_source.stride()),
        *(none if bank is None else bank.stride()[:3]),
        D=head_dim,
        D0=columns,
        D1=rest,
        BM=block_m,
        BN=block_n,
        CAUSAL=causal,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def padded(head_dim):
    """Columns as one power of two: 64 for 40, where `split` takes 32 + 16."""
    return max(16, triton.next_power_of_2(head_dim)), 0


def attention_restore_padded(q, *args, **kwargs):
    """`attention_restore` with heads padded to a power of two: more arithmetic in fewer, wider instructions."""
    return attention_restore(q, *args, **kwargs, columns=padded(q.shape[3]))


# Name, head dimension, queries, keys: the attentions of SD1.x, SD2.x, SDXL and their text encoders. Small: 256 x 256.
TRUE_SHAPES = (
    ("sd15_self_4096", 40, 4096, 4096),
    ("sd15_self_1024", 80, 1024, 1024),
    ("sd15_self_256", 160, 256, 256),
    ("sd15_self_64", 160, 64, 64),
    ("sd15_small_64", 80, 64, 64),
    ("sd15_cross_4096", 40, 4096, 77),
    ("sd15_cross_1024", 80, 1024, 77),
    ("sd15_cross_256", 160, 256, 77),
    ("sdxl_self_4096", 64, 4096, 4096),
    ("sdxl_cross_4096", 64, 4096, 77),
    ("clip_text_77", 64, 77, 77),
)


def _case(name, arch, head_dim, queries, keys, given, dtype="fp16", columns=None):
    block_m, block_n, warps, stages = config(arch, head_dim, queries, keys, "head_source" in given)
    pointers = {"source": "*i32:16", "head_source": "*i32:16", "bank": f"*{dtype}:16", "kv_row": "*i32:16"}
    optional = {**pointers, "kv_length": "*i32:16"}
    optional |= {"more_k": f"*{dtype}:16", "more_v": f"*{dtype}:16"}
    strides = ("qb", "qm", "kb", "kn", "vb", "vn", "mkb", "mkn", "mvb", "mvn", "bs", "bm")
    return CompileCase(
        kernel="attention_restore",
        config=name,
        function=attention_restore_kernel,
        arguments={
            **dict.fromkeys(("out", "q", "k", "v"), f"*{dtype}:16"),
            **{n: optional[n] for n in given},
            **dict.fromkeys(("B", "M", "N", "L", "H", "s_sb", "s_sm", "s_hb", "s_hm", "s_hh", "s_bh"), "i32"),
            **{f"s_{n}": "i32:16" for n in strides},
            "scale": "fp32",
        },
        constants={
            **{n: None for n in optional if n not in given},
            **dict(zip(("D0", "D1"), columns or split(head_dim), strict=True)),
            "D": head_dim,
            "BM": block_m,
            "BN": block_n,
            "CAUSAL": queries == keys == 77,
        },
        num_warps=warps,
        num_stages=stages,
        archs=(arch,),
        has_dot=True,
    )


def compile_cases():
    """Every config at a true shape with a source map; the other options once."""
    heads = ("source", "head_source", "bank")
    cases = [
        case
        for arch in (80, 90)
        for case in (
            *(_case(f"{name}_fp16", arch, *shape, ("source", "kv_row")) for name, *shape in TRUE_SHAPES),
            _case("sd15_self_4096_fp16_heads", arch, 40, 4096, 4096, heads),
            _case("sd15_self_1024_fp16_heads", arch, 80, 1024, 1024, heads),
            _case("sd15_self_256_fp16_heads", arch, 160, 256, 256, heads),
        )
    ]
    return [
        *cases,
        *(
            _case(f"sd15_self_{length}_fp16_padded", 90, width, length, length, (), columns=padded(width))
            for length, width in ((4096, 40), (1024, 80), (256, 160))
        ),
        _case("sd3_joint_4096_bf16", 90, 64, 4096, 4096, ("source", "more_k", "more_v"), "bf16"),
        _case("sd15_self_4096_fp16_plain", 90, 40, 4096, 4096, ()),
        _case("sdxl_self_4096_bf16", 90, 64, 4096, 4096, ("source",), "bf16"),
        _case("clip_text_77_fp16_lengths", 90, 64, 77, 77, ("source", "kv_length")),
    ]
