"""Causal attention of many runs that differ from a base run only from some token on.

A run of a text encoder is its base run up to its first patched token. So only the suffix is computed: the suffixes of
all runs lie packed one after another, and their queries see the base run's keys and values before them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._register import Op, triton_launcher


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    cu_seqlens: Tensor,
    base: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Each run by itself, over its base run's keys followed by its own.

    Args:
        q, k, v: packed suffixes ``[total, H, d]``, any float dtype. Run ``r`` holds rows ``cu_seqlens[r]`` to
            ``cu_seqlens[r + 1]``, which are the last tokens of its sequence of ``T``.
        k_base, v_base: keys and values of the base runs ``[G, T, H, d]``.
        cu_seqlens: int32 ``[N + 1]``, from 0 to ``total``; a suffix has 0 to ``T`` tokens.
        base: base run of each run, int32 ``[N]``; the first for all by default.
        key_mask: which keys may be seen, bool ``[G, T]``; all by default. A query that sees none gives zero.
        scale: factor on the scores; ``d ** -0.5`` by default.

    Returns:
        ``[total, H, d]``, dtype of ``q``. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_ragged(q, k, v, k_base, v_base, cu_seqlens, base, key_mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    length, bounds = k_base.shape[1], cu_seqlens.tolist()
    out = torch.empty_like(q)
    for run, (first, last) in enumerate(pairwise(bounds)):
        start, group = length - (last - first), 0 if base is None else int(base[run])
        keys = torch.cat([k_base[group, :start], k[first:last]]).to(wide)
        values = torch.cat([v_base[group, :start], v[first:last]]).to(wide)
        scores = torch.einsum("mhd,nhd->hmn", q[first:last].to(wide), keys) * _scale(q, scale)
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[start:]
        if key_mask is not None:
            visible = visible & key_mask[group]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
        out[first:last] = torch.einsum("hmn,nhd->mhd", weights, values).to(q.dtype)
    return out


def padded_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    cu_seqlens: Tensor,
    base: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention, every run unpacked to its full length."""
    check_ragged(q, k, v, k_base, v_base, cu_seqlens, base, key_mask)
    runs, length = len(cu_seqlens) - 1, k_base.shape[1]
    bounds = cu_seqlens.long()
    run = torch.repeat_interleave(torch.arange(runs, device=q.device), bounds.diff(), output_size=q.shape[0])
    position = torch.arange(q.shape[0], device=q.device) - bounds[1:][run] + length
    group = torch.zeros(runs, dtype=torch.long, device=q.device) if base is None else base.long()
    queries = q.new_zeros(runs, *k_base.shape[1:])
    keys, values = k_base[group], v_base[group]
    queries[run, position], keys[run, position], values[run, position] = q, k, v
    visible = None
    if key_mask is not None:
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() & key_mask[group][:, None, None]
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible,
        is_causal=visible is None,
        scale=_scale(q, scale),
    ).transpose(1, 2)
    if visible is not None:
        out = torch.where(visible.any(-1).transpose(1, 2)[..., None], out, 0)
    return out[run, position]


def check_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    cu_seqlens: Tensor,
    base: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if not q.shape == k.shape == v.shape:
        raise KernelError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected one shape, [total, H, d]"
        )
    if k_base.shape != v_base.shape or k_base.ndim != 4 or k_base.shape[2:] != q.shape[1:]:
        raise KernelError(
            f"k_base {tuple(k_base.shape)} and v_base {tuple(v_base.shape)}: expected [G, T, H, d], "
            f"with H and d of q {tuple(q.shape)}"
        )
    for name, value, shape in (
        ("base", base, (len(cu_seqlens) - 1,)),
        ("key_mask", key_mask, tuple(k_base.shape[:2])),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise KernelError(f"{name} {tuple(value.shape)}: expected {list(shape)}")


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _fake(q: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(q)


def _shape_class(q: Tensor, *_: object, **__: object) -> str:
    return f"hd{q.shape[-1]}"


ragged_prefix_attention = Op(
    "ragged_prefix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor k_base, Tensor v_base, Tensor cu_seqlens, Tensor? base=None, "
    "Tensor? key_mask=None, float? scale=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": padded_sdpa, "triton": triton_launcher("ragged_prefix_attention")},
    shape_class=_shape_class,
)
