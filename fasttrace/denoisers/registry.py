"""Which adapter is which model's, by the name of its class."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from ..pipeline import check_traceable, refuse_offloaded
from .denoiser import Denoiser
from .flux import Flux
from .pixart import PixArt
from .sd3 import SD3
from .unet import UNet

DENOISERS: dict[str, type[Denoiser]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
}


def denoiser_of(pipe: Any) -> Denoiser:
    """The adapter of a pipeline's denoiser.

    Raises:
        ModelError: a denoiser of another class, or one that is offloaded.
    """
    model = getattr(pipe, "transformer", None)
    if model is None:
        check_traceable(pipe)
        return UNet(pipe)
    name = type(model).__name__
    if name not in DENOISERS:
        raise ModelError(f"{type(pipe).__name__} has a {name}: expected one of {', '.join(DENOISERS)}")
    refuse_offloaded(pipe)
    return DENOISERS[name](pipe)
