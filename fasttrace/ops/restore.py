"""The one description of a patched batch that every engine and kernel reads: which value each position takes.

``source`` is an int32 map ``[B, P]`` over the rows and positions of a site's value ``[B, P, D]``:

=================  ==================================================================================
code               the position's value
=================  ==================================================================================
``KEEP`` (-1)      what the forward pass computed
``ZERO`` (-2)      zero
``c >= 0, c < B``  row ``c`` of this batch, same position: the clean run, or any other, in lockstep
``c >= B``         slot ``c - B`` of the bank, same position: a cached activation or a given tensor
``c <= -3``        what was computed, plus slot ``-3 - c`` of the bank
=================  ==================================================================================

Where a whole row is patched the map may be an expanded view with stride 0, so that nothing of size ``B x P`` exists.
A row that others copy from must not itself be patched at that site: sources are read before anything is overwritten,
in every implementation, so a chain of copies would not be followed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

KEEP = -1
ZERO = -2
ADD = -3


def slot_code(slot: int, rows: int) -> int:
    """Code that copies bank slot ``slot`` in a batch of ``rows`` rows."""
    return rows + slot


def add_code(slot: int) -> int:
    """Code that adds bank slot ``slot`` to what was computed."""
    return ADD - slot


def keep_all(like: Tensor) -> Tensor:
    """The map ``[B, P]`` that keeps everything, for a value ``[B, P, ...]``: one number, sent to the device once."""
    return _keep(like.device).expand(like.shape[:2])


@cache
def _keep(device: torch.device) -> Tensor:
    return torch.full((1, 1), KEEP, dtype=torch.int32, device=device)


def restore(value: Tensor, source: Tensor, bank: Tensor | None = None) -> Tensor:
    """Overwrite positions of a site's value as ``source`` says: the plain reference.

    Args:
        value: ``[B, P, D]``, any float dtype.
        source: int32 or int64 codes ``[B, P]``, on the same device.
        bank: ``[S, P, D]`` cached or given values; may be an expanded view. Needed by codes that name a slot.

    Returns:
        A new tensor like ``value``; ``value`` is left alone.
    """
    rows = value.shape[0]
    position = torch.arange(value.shape[1], device=value.device)
    code = source.long()
    from_row = value[code.clamp(0, rows - 1), position]
    result = torch.where(((code >= 0) & (code < rows))[..., None], from_row, value)
    result = torch.where((code == ZERO)[..., None], torch.zeros((), dtype=value.dtype, device=value.device), result)
    if bank is not None and bank.shape[0]:
        bank = bank.to(value.dtype)
        from_slot = bank[(code - rows).clamp(0, bank.shape[0] - 1), position]
        added = value + bank[(ADD - code).clamp(0, bank.shape[0] - 1), position]
        result = torch.where((code >= rows)[..., None], from_slot, result)
        result = torch.where((code <= ADD)[..., None], added, result)
    return result
