"""Token and position embeddings of a batch of prompts, with Gaussian noise on the corrupted tokens.

``out[r, t] = (table[ids[r, t]] + mask[r, t] * sigma[r] * normal(seed[r], sample[r], t)) + positions[t]``

The noise is that of ``fasttrace.corruption``: a draw depends on seed, noise sample, token and channel alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..corruption import philox_normal
from ..errors import KernelError
from ._register import Op, triton_launcher
from .philox import philox_normals


def reference(
    ids: Tensor, table: Tensor, positions: Tensor, mask: Tensor, sigma: Tensor, sample: Tensor, seed: Tensor
) -> Tensor:
    """Corrupted embeddings of ``R`` rows.

    Args:
        ids: token ids ``[R, T]``, integer; one prompt for all rows is an expanded view.
        table: token embeddings ``[V, D]``, any float dtype.
        positions: position embeddings ``[T or more, D]``, dtype of ``table``.
        mask: corrupted tokens ``[R, T]``, bool.
        sigma: standard deviation of each row ``[R]``, fp32; zero for a clean row.
        sample: noise sample of each row ``[R]``, int32.
        seed: Philox key of each row ``[R]``, int64.

    Returns:
        ``[R, T, D]``, dtype of ``table``. Sums are taken in fp32 (fp64 for an fp64 table) and rounded once.

    Raises:
        KernelError: shapes that do not fit together.
    """
    check_embed(ids, table, positions, mask, sigma, sample, seed)
    wide = torch.promote_types(table.dtype, torch.float32)
    words = table[ids.long()].to(wide)
    for row in range(ids.shape[0]):
        corrupted = mask[row].nonzero().flatten().cpu()
        if len(corrupted) and sigma[row] != 0:
            noise = philox_normal(int(seed[row]), int(sample[row]), corrupted, table.shape[1])
            words[row, corrupted.to(words.device)] += sigma[row].to(wide) * noise.to(words)
    return (words + positions[: ids.shape[1]].to(wide)).to(table.dtype)


def embed_torch(
    ids: Tensor, table: Tensor, positions: Tensor, mask: Tensor, sigma: Tensor, sample: Tensor, seed: Tensor
) -> Tensor:
    """The same in torch on any device, all noise drawn at once; asks the device how many tokens are corrupted."""
    check_embed(ids, table, positions, mask, sigma, sample, seed)
    wide = torch.promote_types(table.dtype, torch.float32)
    words = F.embedding(ids.long(), table).to(wide)
    row, token = (mask & (sigma != 0)[:, None]).nonzero(as_tuple=True)
    noise = philox_normals(seed[row], sample[row], token, table.shape[1])
    words[row, token] += sigma[row, None].to(wide) * noise.to(wide)
    return (words + positions[: ids.shape[1]].to(wide)).to(table.dtype)


def check_embed(
    ids: Tensor, table: Tensor, positions: Tensor, mask: Tensor, sigma: Tensor, sample: Tensor, seed: Tensor
) -> None:
    """Raise a ``KernelError`` for shapes that do not fit together."""
    rows, length = ids.shape
    if positions.shape[0] < length or positions.shape[1] != table.shape[1]:
        raise KernelError(
            f"positions {tuple(positions.shape)}: expected at least [{length}, {table.shape[1]}], one for each token"
        )
    if tuple(mask.shape) != (rows, length):
        raise KernelError(f"mask {tuple(mask.shape)}: expected [{rows}, {length}] like ids; expand it to every row")
    for name, value in (("sigma", sigma), ("sample", sample), ("seed", seed)):
        if tuple(value.shape) != (rows,):
            raise KernelError(
                f"{name} {tuple(value.shape)}: expected [{rows}], one value a row; expand it to every row"
            )


def _fake(
    ids: Tensor, table: Tensor, positions: Tensor, mask: Tensor, sigma: Tensor, sample: Tensor, seed: Tensor
) -> Tensor:
    return table.new_empty(ids.shape[0], ids.shape[1], table.shape[1])


def _shape_class(ids: Tensor, table: Tensor, *_: object, **__: object) -> str:
    return f"d{table.shape[1]}"


corrupt_embed = Op(
    "corrupt_embed",
    "(Tensor ids, Tensor table, Tensor positions, Tensor mask, Tensor sigma, Tensor sample, Tensor seed) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations={"torch": embed_torch, "triton": triton_launcher("corrupt_embed")},
    shape_class=_shape_class,
)
