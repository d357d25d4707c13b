"""A site's value seen as positions x channels, and what one patch does to it: the definition that all engines share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..corruption import philox_normal
from ..errors import PatchError
from ..patch import ZERO, Add, Noise, Patch


def element(output: Any, index: int) -> Tensor:
    """The value of a site: a module's output, or an element of it where that is a tuple."""
    value = output[index] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    assert isinstance(value, Tensor)
    return value


def with_element(output: Any, index: int, value: Tensor) -> Any:
    """The same output with the site's value replaced."""
    if isinstance(output, tuple | list):
        return type(output)([*output[:index], value, *output[index + 1 :]])
    if isinstance(output, Tensor):
        return value
    output.sample = value
    return output


def first(output: Any) -> Tensor:
    """A module's output, or its first element."""
    return element(output, 0)


def with_first(output: Any, value: Tensor) -> Any:
    """The same output with that replaced."""
    return with_element(output, 0, value)


def to_positions(value: Tensor) -> Tensor:
    """``[..., C, h, w]`` of a spatial site as ``[..., h * w, C]``; a view. ``value`` has a batch dimension."""
    return value.flatten(2).transpose(1, 2) if value.ndim == 4 else value


def from_positions(value: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_positions`, in the shape of ``like`` but for the batch."""
    return value.transpose(1, 2).reshape(value.shape[0], *like.shape[1:]) if like.ndim == 4 else value


def given_value(patch: Patch, tensor: Tensor, positions: int, channels: int, spatial: tuple[int, int] | None) -> Tensor:
    """A tensor source as ``[P, D]``.

    Args:
        tensor: ``[D]``, ``[P, D]``, or ``[C, h, w]`` where the site is spatial.
        spatial: ``(h, w)`` of a spatial site.

    Raises:
        PatchError: any other shape.
    """
    if tensor.ndim == 3 and spatial is not None and tensor.shape == (channels, *spatial):
        return tensor.flatten(1).T
    if tensor.shape == (channels,):
        return tensor.expand(positions, channels)
    if tensor.shape == (positions, channels):
        return tensor
    expected = f"[{channels}] or [{positions}, {channels}]"
    if spatial is not None:
        expected += f" or [{channels}, {spatial[0]}, {spatial[1]}]"
    raise PatchError(f"{patch.site}: the source tensor has shape {list(tensor.shape)}, expected {expected}")


def apply_patch(value: Tensor, patch: Patch, source_value: Tensor | None) -> Tensor:
    """One patch on one run's value, in plain operations.

    Args:
        value: ``[P, D]`` or ``[C, h, w]``: what the forward computed.
        patch: positions must be resolved; steps and branch are the caller's concern.
        source_value: the same site's value in the source run, where ``patch.source`` is the name of a run.

    Returns:
        The patched value, in the shape of ``value``; a new tensor.
    """
    spatial = (value.shape[1], value.shape[2]) if value.ndim == 3 else None
    table = to_positions(value[None])[0]
    result = table.clone()
    positions, channels = table.shape
    assert not isinstance(patch.positions, str)
    where = list(range(positions)) if patch.positions is None else list(patch.positions)
    source = patch.source
    if source is ZERO:
        result[where] = 0
    elif isinstance(source, Noise):
        drawn = source.sigma * philox_normal(source.seed, 0, where, channels)
        result[where] += drawn.to(result)
    elif isinstance(source, Add):
        result[where] += given_value(patch, source.value, positions, channels, spatial)[where].to(result)
    elif isinstance(source, Tensor):
        result[where] = given_value(patch, source, positions, channels, spatial)[where].to(result)
    else:
        assert source_value is not None
        result[where] = to_positions(source_value[None])[0][where]
    return from_positions(result[None], value[None])[0]


def nan_rows(values: Tensor) -> list[int]:
    """Indices along the first dimension whose values are not all finite."""
    if not values.numel():
        return []
    return torch.nonzero(~torch.isfinite(values.flatten(1)).all(dim=1)).flatten().tolist()
