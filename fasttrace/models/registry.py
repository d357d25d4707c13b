"""Which description is which model's, by the name of its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .description import Description
from .flux import describe_flux
from .pixart import describe_pixart
from .sd3 import describe_sd3
from .unet import describe_unet

DESCRIBE: Mapping[str, Callable[[Any], Description]] = {
    "UNet2DConditionModel": describe_unet,
    "SD3Transformer2DModel": describe_sd3,
    "FluxTransformer2DModel": describe_flux,
    "PixArtTransformer2DModel": describe_pixart,
}


def description_of(model: Any) -> Description | None:
    """The units of a denoiser, or ``None`` where its class is not known."""
    describe = DESCRIBE.get(type(model).__name__)
    return None if describe is None else describe(model)
