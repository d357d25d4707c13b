"""The four styles: rules that redraw a sprite, the same for every object, so that a style can be learnt apart from it.

Each takes and returns straight RGBA, [side, side, 4] fp32 in [0, 1], and the ink that lines are drawn in, [3].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
LUMINANCE = np.asarray((0.299, 0.587, 0.114), np.float32)
BLOCK = 4  # pixels; half the side of a latent cell, so that blocks and stripes lie alike in every cell


def flat(rgba: Picture, ink: Picture) -> Picture:
    """The drawing as it is."""
    return rgba


def outline(rgba: Picture, ink: Picture) -> Picture:
    """Lines where the drawing ends or its lightness steps, on paper that keeps a fifth of the colours."""
    alpha = rgba[..., 3:]
    light = (rgba[..., :3] @ LUMINANCE)[..., None] * alpha
    inner = np.minimum.reduce(_neighbours(alpha))
    steps = np.maximum.reduce([np.abs(light - other) for other in _neighbours(light)]) * (inner > 0.5)
    line = np.clip(np.maximum((alpha - inner) * 1.5, (steps - 0.12) * 4), 0, 1)
    paper = 1 - 0.2 * (1 - rgba[..., :3])
    return np.concatenate([paper + line * (ink - paper), alpha], axis=-1)


def mosaic(rgba: Picture, ink: Picture) -> Picture:
    """Square tiles of one colour each, a tile wherever the drawing fills half of one."""
    tiles = len(rgba) // BLOCK
    alpha = rgba[..., 3:]
    blocks = np.concatenate([rgba[..., :3] * alpha, alpha], axis=-1).reshape(tiles, BLOCK, tiles, BLOCK, 4)
    mean = blocks.mean(axis=(1, 3))
    mean[..., :3] /= np.maximum(mean[..., 3:], 1e-6)
    mean[..., 3] = mean[..., 3] > 0.5
    return mean.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def striped(rgba: Picture, ink: Picture) -> Picture:
    """Level bands, lightened and darkened in turn, so that they show on white and on black alike."""
    dark = (np.arange(len(rgba)) // BLOCK % 2 == 1)[:, None, None]
    rgb = np.where(dark, rgba[..., :3] * np.float32(0.5), 1 - (1 - rgba[..., :3]) * np.float32(0.5))
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1)


STYLES: dict[str, Callable[[Picture, Picture], Picture]] = {
    "flat style": flat,
    "outline style": outline,
    "mosaic style": mosaic,
    "striped style": striped,
}


def _neighbours(plane: Picture) -> list[Picture]:
    """The plane moved by one pixel in each of four directions, its edge repeated."""
    padded = np.pad(plane, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return [padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]]
