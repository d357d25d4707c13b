"""Quarter turns built into the scorer's image tower, so that it knows an object in a pose that it never saw it in.

Channels come in four blocks of equal width, one a quarter turn: turn the picture, and the tower's states are the same
states at turned places, their blocks moved on by one (Cohen & Welling 2016, "Group equivariant convolutional networks",
the regular representation of C4). Weights that do this form a linear subspace, and the mean over the four turns is the
nearest point of it. A tower that starts there and whose gradients are projected stays there, but for rounding. It is an
ordinary ``CLIPVisionModel`` all the same; only ``visual_projection`` is free, and tells poses by the order of blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

TURNS = 4


def project(name: str, value: Tensor) -> Tensor:
    """The symmetric part of an image tower's parameter, or of its gradient; ``name`` as in ``named_parameters``."""
    return torch.stack([_turned(name, value, k) for k in range(TURNS)]).mean(0)


def _turned(name: str, value: Tensor, turns: int) -> Tensor:
    """The parameter turned, blocks and places together; a symmetric one comes back the same."""
    if "patch_embedding" in name:  # [D, 3, P, P]: the filters of a block are those of the one before, turned
        return _roll(torch.rot90(value, turns, (-2, -1)), turns, 0)
    if "position_embedding" in name:  # [1 + side * side, D], the class token first
        side = round((len(value) - 1) ** 0.5)
        places = torch.rot90(value[1:].reshape(side, side, -1), turns).flatten(0, 1)
        return _roll(torch.cat([value[:1], places]), turns, 1)
    for axis in range(value.ndim):  # [D], or [out, in]
        value = _roll(value, turns, axis)
    return value


def _roll(value: Tensor, blocks: int, axis: int) -> Tensor:
    return value.roll(blocks * (value.shape[axis] // TURNS), axis)


@torch.no_grad()
def impose(tower: Any) -> None:
    """Project a ``CLIPVisionModel``'s parameters in place."""
    for name, parameter in tower.named_parameters():
        parameter.copy_(project(name, parameter))


def keep(tower: Any) -> None:
    """Have the gradients of a ``CLIPVisionModel`` projected whenever they are computed."""
    for name, parameter in tower.named_parameters():
        parameter.register_hook(partial(project, name))
