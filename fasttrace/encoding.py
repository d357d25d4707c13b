"""A prompt as a pipeline's own ``encode_prompt`` encodes it, whatever encoders it has, with noise on word embeddings.

Nothing is known here of how a pipeline puts its encoders together: it runs as it is, and a forward hook on each
encoder's table of word embeddings sees the token ids and adds the noise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .pipeline import Condition
from .sites import TEXT_PARTS


@dataclass(frozen=True)
class Encoded:
    """What a denoiser is given of one prompt.

    Attributes:
        embeds: ``[T, D]``.
        pooled: ``[P]``, or ``None``.
        mask: ``[T]``, 1 where a token counts; ``None`` where all do.
        ids: token ids ``[T]`` as each encoder read them, by part.
    """

    embeds: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    ids: dict[str, tuple[int, ...]]

    @property
    def condition(self) -> Condition:
        """What traces take; without SDXL's time ids."""
        return Condition(self.embeds, self.pooled, None, self.mask)


def word_embeddings(encoder: Any) -> nn.Module:
    """The module that an encoder calls for its word embeddings.

    T5's ``get_input_embeddings`` gives another one, which shares its weights and is never called.
    """
    module: nn.Module = encoder.encoder.embed_tokens if hasattr(encoder, "shared") else encoder.get_input_embeddings()
    return module


@torch.no_grad()
def encode(pipe: Any, text: str, noise: Mapping[str, Tensor] | None = None) -> Encoded:
    """One prompt through every text encoder of a pipeline.

    Args:
        pipe: Stable Diffusion, SDXL, SD3, FLUX or PixArt.
        text: the prompt, for all encoders.
        noise: ``[T, D]`` by part (``"text_encoder_2"``), added to that encoder's word embeddings; parts that are left
            out stay clean. ``T`` is the length to which the pipeline pads.

    Raises:
        ModelError: the pipeline has no part of that name, or the noise is of another shape.
    """
    noise = dict(noise or {})
    encoders = {part: getattr(pipe, part) for part in TEXT_PARTS if getattr(pipe, part, None) is not None}
    unknown = noise.keys() - encoders.keys()
    if unknown:
        raise ModelError(f"no {sorted(unknown)[0]} in {type(pipe).__name__}: expected noise for {', '.join(encoders)}")
    ids = dict[str, tuple[int, ...]]()
    with contextlib.ExitStack() as stack:
        for part, encoder in encoders.items():
            stack.enter_context(_hook(word_embeddings(encoder), _see(part, ids, noise.get(part))))
        returned = pipe.encode_prompt(text, **_arguments(pipe))
    classes = [one.__name__.removesuffix("Pipeline") for one in type(pipe).__mro__]
    names = next((_RETURNS[one] for one in classes if one in _RETURNS), ("embeds",))
    found = {name: value[0] for name, value in zip(names, returned, strict=False) if name}
    return Encoded(found["embeds"], found.get("pooled"), found.get("mask"), ids)


# What `encode_prompt` returns, in its order.
_RETURNS: dict[str, tuple[str, ...]] = {
    "StableDiffusionXL": ("embeds", "", "pooled"),
    "StableDiffusion3": ("embeds", "", "pooled"),
    "Flux": ("embeds", "pooled"),
    "PixArtAlpha": ("embeds", "mask"),
    "PixArtSigma": ("embeds", "mask"),
}


def _arguments(pipe: Any) -> dict[str, Any]:
    """What the pipeline's own call gives ``encode_prompt``, without an unconditional branch."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    takes = inspect.signature(pipe.encode_prompt).parameters
    given = {
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "clean_caption": is_bs4_available() and is_ftfy_available(),  # PixArt's own call cleans where it can
    }
    return {name: value for name, value in given.items() if name in takes}


def _see(part: str, ids: dict[str, tuple[int, ...]], noise: Tensor | None) -> Callable[..., Tensor | None]:
    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        ids[part] = tuple(args[0][0].tolist())
        if noise is None:
            return None
        if noise.shape != output.shape[1:]:
            expected = list(output.shape[1:])
            raise ModelError(f"noise on the word embeddings of {part} is {list(noise.shape)}: expected {expected}")
        return output + noise.to(output)

    return see


@contextlib.contextmanager
def _hook(module: nn.Module, see: Callable[..., Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
