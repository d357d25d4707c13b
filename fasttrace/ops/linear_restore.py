"""A linear layer whose result is a site's value: restored, noised, and added to the residual stream, in one pass.

``out = gate * (restore(x Wᵀ + b + (x K) Uᵀ, source, bank) + mask * sigma * normal) + residual``

The site's value is what a hook would see: everything before gate and residual, in the storage dtype. Codes of rows
copy what the *source row* computes, so an implementation may gather the source row's inputs instead of waiting for its
result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..corruption import philox_normal
from ..errors import KernelError
from ._register import Op, triton_launcher
from .philox import philox_normals
from .restore import restore


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    source: Tensor,
    bank: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    low_rank: Sequence[Tensor] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The projection by its definition.

    Args:
        x: inputs ``[B, P, K]``, any float dtype.
        weight: ``[N, K]``.
        bias: ``[N]``.
        residual: ``[B, P, N]``, added to each row as it is, restored or not.
        source: codes ``[B, P]``, as in ``fasttrace.ops.restore``.
        bank: ``[S, P, N]`` values that codes name.
        noise: ``(sigma [B] fp32, seed [B] int64, mask [B, P] bool)``: each masked position of row ``b`` gets
            ``sigma[b]`` times the normals of key ``seed[b]``, sample 0, token = position, as ``fasttrace.corruption``
            lays them out; after restoring.
        low_rank: ``(x K [B, P, r], U [B, N, r])``: each row's own edit of the weight, ``W + U Kᵀ``, r at most 64.
        gate: ``[B, N]``, each row's own factor on the restored value, as a transformer's modulation gives it.

    Returns:
        ``[B, P, N]``, dtype of ``x``, contiguous. Products are summed in fp32 (fp64 for fp64 inputs).

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_linear(x, weight, bias, residual, source, bank, noise, low_rank, gate)
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        value += bias.to(wide)
    if low_rank is not None:
        value += low_rank[0].to(wide) @ low_rank[1].to(wide).transpose(1, 2)
    value = noised(restore(value.to(x.dtype), source, bank), noise).to(wide)
    if gate is not None:
        value = value * gate.to(wide)[:, None]
    if residual is not None:
        value = value + residual.to(wide)
    return value.to(x.dtype)


def linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    source: Tensor,
    bank: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    low_rank: Sequence[Tensor] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The same by torch's matrix product, with copies after it."""
    check_linear(x, weight, bias, residual, source, bank, noise, low_rank, gate)
    value = noised_torch(restore(_product(x, weight, bias, low_rank), source, bank), noise)
    if gate is None:
        return value if residual is None else value + residual
    gate = gate[:, None]
    return value * gate if residual is None else torch.addcmul(residual, value, gate)


def linear_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    source: Tensor,
    bank: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    low_rank: Sequence[Tensor] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The same by the library's matrix product, and one pass of ``kernels/epilogue`` for all the rest."""
    check_linear(x, weight, bias, residual, source, bank, noise, low_rank, gate)
    value = _product(x, weight, bias, low_rank)
    result: Tensor = _epilogue(value, source, bank, noise, gate=gate, residual=residual)
    return result


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[Tensor] | None) -> Tensor:
    value = F.linear(x, weight, bias)
    return value if low_rank is None else torch.baddbmm(value, low_rank[0], low_rank[1].transpose(1, 2))


def noised(value: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """Add noise to masked positions of a site's value ``[B, P, D]``, drawn by the corruption's own generator."""
    if noise is None:
        return value
    sigma, seed, mask = noise
    wide = torch.promote_types(value.dtype, torch.float32)
    result = value.clone()
    for row in range(value.shape[0]):
        where = mask[row].nonzero().flatten()
        drawn = philox_normal(int(seed[row]), 0, where.cpu(), value.shape[2]).to(value.device, wide)
        result[row, where] = (value[row, where].to(wide) + sigma[row].to(wide) * drawn).to(value.dtype)
    return result


def noised_torch(value: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """The same on any device, all rows at once; asks the device how many positions are masked."""
    if noise is None:
        return value
    sigma, seed, mask = noise
    row, position = mask.nonzero(as_tuple=True)
    drawn = philox_normals(seed[row], torch.zeros_like(position), position, value.shape[2])
    result = value.clone()
    result[row, position] = (value[row, position] + sigma[row, None] * drawn).to(value.dtype)
    return result


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    source: Tensor,
    bank: Tensor | None,
    noise: Sequence[Tensor] | None,
    low_rank: Sequence[Tensor] | None,
    gate: Tensor | None,
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise KernelError(
            f"linear_restore: x {list(x.shape)} and weight {list(weight.shape)}; expected [B, P, K], [N, K]"
        )
    rows, positions, _ = x.shape
    channels = weight.shape[0]
    rank = low_rank[0].shape[-1] if low_rank is not None else 0
    named: list[tuple[str, Tensor | None, list[int]]] = [
        ("bias", bias, [channels]),
        ("residual", residual, [rows, positions, channels]),
        ("source", source, [rows, positions]),
        ("bank", bank, [bank.shape[0] if bank is not None else 0, positions, channels]),
        ("gate", gate, [rows, channels]),
    ]
    if noise is not None:
        named += zip(("sigma", "seed", "mask"), noise, ([rows], [rows], [rows, positions]), strict=True)
    if low_rank is not None:
        named += zip(("x K", "U"), low_rank, ([rows, positions, rank], [rows, channels, rank]), strict=True)
    for name, tensor, shape in named:
        if tensor is not None and list(tensor.shape) != shape:
            raise KernelError(f"linear_restore: {name} {list(tensor.shape)}; expected {shape}; expand what rows share")
    if rank > 64:
        raise KernelError(f"linear_restore: low-rank term of rank {rank}; at most 64: add a larger one to the weight")


def _fake(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def shape_class(x: Tensor, weight: Tensor, *_: object, **__: object) -> str:
    few = "few" if x.shape[:-1].numel() < 4096 else "many"
    return f"n{weight.shape[0]}_k{weight.shape[1]}_{few}"


_epilogue = triton_launcher("epilogue")

linear_restore = Op(
    "linear_restore",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor source, Tensor? bank=None, Tensor[]? noise=None,"
    " Tensor[]? low_rank=None, Tensor? gate=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={
        "torch": linear_torch,
        "epilogue": linear_epilogue,
        "triton": triton_launcher("linear_restore"),
    },
    shape_class=shape_class,
)
