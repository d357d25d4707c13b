"""Self- and cross-attention of a patched batch, before the output projection.

Two things are known from the plan. ``source`` is the source map of the *site*, the projected output: a position that
takes its value from elsewhere (another row, a slot, zero) needs no attention here, so its result is zero and blocks of
such positions cost nothing; the projection that follows makes the copy. ``head_source`` restores single *head values*,
which the projection mixes, so they are restored here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import KernelError
from ._register import Implementation, ImplementationError, Op, triton_launcher
from .restore import ADD, KEEP, restore


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor | None = None,
    head_source: Tensor | None = None,
    bank: Tensor | None = None,
    kv_row: Tensor | None = None,
    kv_length: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    more_k: Tensor | None = None,
    more_v: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k^T) v`` for each row and head, by its definition.

    Args:
        q: queries ``[B, M, H, d]``, any float dtype.
        k, v: keys and values ``[Bk, N, H, d]``.
        source: codes ``[B, M]`` of the site whose projection follows, as in ``fasttrace.ops.restore``. Positions that
            take their value from elsewhere are zero in the result.
        head_source: codes ``[B, M, H]`` of the head values. Codes of rows copy the head's attention of that row.
        bank: head values ``[S, M, H, d]`` that codes of ``head_source`` name.
        kv_row: which row of ``k`` and ``v`` each query row attends to, int32 ``[B]``; by default its own. Lets all
            rows of one text share its keys and values.
        kv_length: visible keys of each row of ``k``, int32 ``[Bk]``: the keys beyond are padding. A row with no visible
            key gives zero.
        causal: query ``i`` sees keys up to ``i``; needs ``M == N``.
        scale: factor on the scores; ``d ** -0.5`` by default.
        more_k, more_v: keys and values ``[Bk, L, H, d]`` that every query sees after those of ``k`` and ``v``, as a
            joint attention reads both of its streams; all visible, not with ``causal``.

    Returns:
        ``[B, M, H, d]``, dtype of ``q``, contiguous. Arithmetic in fp32, or fp64 for fp64 inputs.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_attention(q, k, v, source, head_source, kv_row, kv_length, causal, more_k, more_v)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, own = _joined(k, v, more_k, more_v)
    visible = _visible(q, k, kv_row, kv_length, causal, own)
    row = torch.arange(q.shape[0], device=q.device) if kv_row is None else kv_row.long()
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(wide), k[row].to(wide)) * _scale(q, scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    value = torch.einsum("bhmn,bnhd->bmhd", weights, v[row].to(wide))
    return _restored(value, source, head_source, bank).to(q.dtype).contiguous()


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor | None = None,
    head_source: Tensor | None = None,
    bank: Tensor | None = None,
    kv_row: Tensor | None = None,
    kv_length: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    more_k: Tensor | None = None,
    more_v: Tensor | None = None,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention, with copies after it."""
    check_attention(q, k, v, source, head_source, kv_row, kv_length, causal, more_k, more_v)
    k, v, own = _joined(k, v, more_k, more_v)
    if kv_row is not None:
        k, v = k.index_select(0, kv_row), v.index_select(0, kv_row)
    visible = None if kv_length is None else _visible(q, k, kv_row, kv_length, causal, own)
    value = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=causal and visible is None,
        scale=_scale(q, scale),
    ).transpose(1, 2)
    if visible is not None:
        value = torch.where(visible.any(-1).transpose(1, 2)[..., None], value, 0)
    return _restored(value, source, head_source, bank).contiguous()


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor | None,
    head_source: Tensor | None,
    kv_row: Tensor | None,
    kv_length: Tensor | None,
    causal: bool,
    more_k: Tensor | None,
    more_v: Tensor | None,
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    rows, length, heads, width = q.shape
    if k.shape != v.shape or k.shape[2:] != (heads, width):
        raise KernelError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected both [rows, keys, {heads}, {width}], "
            f"as q is {tuple(q.shape)}"
        )
    if kv_row is None and k.shape[0] != rows:
        raise KernelError(
            f"k has {k.shape[0]} rows and q {rows}: pass kv_row to say which row each query row attends to"
        )
    if more_k is not None or more_v is not None:
        expected = [k.shape[0], 0 if more_k is None else more_k.shape[1], heads, width]
        if more_k is None or more_v is None or [*more_k.shape] != expected or [*more_v.shape] != expected or causal:
            shapes = ["absent" if more is None else list(more.shape) for more in (more_k, more_v)]
            raise KernelError(
                f"more_k {shapes[0]} and more_v {shapes[1]}, causal={causal}: expected both "
                f"[{k.shape[0]}, keys, {heads}, {width}], as k is {list(k.shape)}, and no causal mask"
            )
    if causal and k.shape[1] != length:
        raise KernelError(f"causal attention needs as many keys as queries; got {k.shape[1]} and {length}")
    for name, value, shape in (
        ("source", source, (rows, length)),
        ("head_source", head_source, (rows, length, heads)),
        ("kv_row", kv_row, (rows,)),
        ("kv_length", kv_length, (k.shape[0],)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise KernelError(
                f"{name} {tuple(value.shape)}: expected {list(shape)}; expand it if it is the same for all"
            )


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _joined(k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Both segments in one, and how many keys are of the first."""
    if more_k is None or more_v is None:
        return k, v, k.shape[1]
    return torch.cat([k, more_k], 1), torch.cat([v, more_v], 1), k.shape[1]


def _visible(
    q: Tensor, k: Tensor, kv_row: Tensor | None, kv_length: Tensor | None, causal: bool, own: int
) -> Tensor | None:
    """Which keys each query sees, bool, broadcastable to ``[B, H, M, N]``; ``None`` for all.

    ``kv_length`` is of the first ``own`` keys; those after them are all visible.
    """
    keys = torch.arange(k.shape[1], device=q.device)
    visible = None
    if causal:
        visible = (keys <= torch.arange(q.shape[1], device=q.device)[:, None])[None, None]
    if kv_length is not None:
        length = kv_length if kv_row is None else kv_length[kv_row.long()]
        within = ((keys < length[:, None]) | (keys >= own))[:, None, None].expand(-1, -1, q.shape[1], -1)
        visible = within if visible is None else visible & within
    return visible


def _restored(value: Tensor, source: Tensor | None, head_source: Tensor | None, bank: Tensor | None) -> Tensor:
    if head_source is not None:
        shape = value.shape
        flat_bank = None if bank is None else bank.flatten(1, 2)
        value = restore(value.flatten(1, 2), head_source.flatten(1, 2), flat_bank).view(shape)
    if source is not None:
        value = torch.where(is_read(source)[..., None, None], value, 0)
    return value


def is_read(source: Tensor) -> Tensor:
    """Which positions the projection reads, bool ``[B, M]``: those it keeps, adds to, or copies from themselves."""
    own = torch.arange(source.shape[0], device=source.device)[:, None]
    return (source == KEEP) | (source <= ADD) | (source == own)


def attention_by(backend: SDPBackend) -> Implementation:
    """The same by one backend of torch's attention, with copies after it.

    Raises:
        ImplementationError: at the call, if that backend cannot serve it on this machine.
    """

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return attention_sdpa(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError | KernelError):
                raise
            why = str(error).splitlines()[0]
            raise ImplementationError(
                f"attention_restore: {backend.name} cannot serve this call ({why}); choose another implementation"
            ) from error

    return attend


def _fake(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape)


def shape_class(q: Tensor, k: Tensor, *args: object, more_k: Tensor | None = None, **_: object) -> str:
    """Head dimension and length: ``long`` beyond 128 keys, else ``cross`` or, with as few queries, ``text``."""
    queries, keys, width = q.shape[1], k.shape[1] + (0 if more_k is None else more_k.shape[1]), q.shape[3]
    length = "long" if keys > 128 else "cross" if queries > 128 else "text"
    return f"hd{width}_{length}"


attention_restore = Op(
    "attention_restore",
    "(Tensor q, Tensor k, Tensor v, Tensor? source=None, Tensor? head_source=None, Tensor? bank=None, "
    "Tensor? kv_row=None, Tensor? kv_length=None, bool causal=False, float? scale=None, Tensor? more_k=None, "
    "Tensor? more_v=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={
        "torch": attention_sdpa,
        "cudnn": attention_by(SDPBackend.CUDNN_ATTENTION),
        "flash": attention_by(SDPBackend.FLASH_ATTENTION),
        "triton": triton_launcher("attention_restore"),
        "triton_padded": triton_launcher("attention_restore_padded", "attention_restore"),
    },
    shape_class=shape_class,
)
