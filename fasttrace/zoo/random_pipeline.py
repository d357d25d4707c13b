"""Pipelines of the true architectures with seeded random weights: for correctness, and for the cost of true shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .architectures import UNETS, Architecture, TextEncoder
from .offline_tokenizer import offline_sentencepiece, offline_tokenizer
from .transformer_architectures import TRANSFORMERS

ARCHITECTURES = {**UNETS, **TRANSFORMERS}

# How much larger than torch's default the cross-attention weights are, so that a change of text changes the picture.
_TEXT_GAIN = 3.0
# T5 does not divide its scores by the square root of a head's width, so its queries are smaller.
_T5_QUERY_GAIN = 0.125
# RMS of the denoiser's output: with a small one a trajectory is well conditioned, as rounding errors are not amplified.
_OUTPUT_GAIN = 0.3


def random_pipeline(
    name: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """A diffusers pipeline with random weights; the same name and seed give the same weights everywhere.

    Args:
        name: ``"sd15"``, ``"sd21"`` or ``"sdxl"`` for the true shapes (859,520,964, 865,910,724 and 2,567,463,684 UNet
            parameters), or their ``"tiny-"`` forms (8 x 8 latents, widths 16 and 32, three text layers). Transformers:
            ``"sd3"``, ``"sd35-medium"``, ``"sd35-large"``, ``"flux"``, ``"pixart-sigma"`` (2.0, 2.2, 8.1, 11.9 and
            0.6 thousand million parameters), ``"tiny-sd3"``, ``"tiny-sd35"``, ``"tiny-flux"``, ``"tiny-pixart"``
            (width 32, two to four blocks; latents of 8 x 8, of PixArt 32 x 32).
        seed: seed of the weights.
        dtype: of all weights. Draws are made in float32, so dtypes agree up to rounding.
        device: of all weights. ``"meta"`` builds the architecture without any storage.

    Raises:
        ModelError: another name.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"no random pipeline {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    import diffusers

    architecture = ARCHITECTURES[name]
    part, kind = architecture.denoiser
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind)(**architecture.denoiser_config)
        vae = diffusers.AutoencoderKL(**architecture.vae)
        encoders = [_text_encoder(text) for text in architecture.text]
    generator = torch.Generator().manual_seed(seed)
    for module in (denoiser, vae, *encoders):
        if torch.device(device).type != "meta":
            _materialise(module, generator, dtype, device)
        module.eval().requires_grad_(False)
    return _assemble(architecture, {part: denoiser, "vae": vae}, encoders)


def _text_encoder(text: TextEncoder) -> Any:
    import transformers

    if text.model == "T5EncoderModel":
        return transformers.T5EncoderModel(transformers.T5Config(**text.config, vocab_size=text.vocabulary))
    eos = text.vocabulary - 1
    special = {"bos_token_id": eos - 1, "eos_token_id": eos, "pad_token_id": eos}
    config = transformers.CLIPTextConfig(**text.config, vocab_size=text.vocabulary, **special)
    return getattr(transformers, text.model)(config)


def _assemble(architecture: Architecture, models: dict[str, nn.Module], encoders: list[nn.Module]) -> Any:
    import diffusers

    scheduler = getattr(diffusers, architecture.scheduler)(**architecture.scheduler_config)
    parts: dict[str, Any] = {**models, "scheduler": scheduler}
    for number, (text, encoder) in enumerate(zip(architecture.text, encoders, strict=True), start=1):
        suffix = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": _tokenizer(text)}
    if architecture.pipeline == "StableDiffusionXLPipeline":
        parts |= {"add_watermarker": False}
    elif architecture.pipeline == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, architecture.pipeline)(**parts)
    if architecture.latents is not None:
        pipe.default_sample_size = architecture.latents
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer(text: TextEncoder) -> Any:
    if text.model == "T5EncoderModel":
        return offline_sentencepiece(text.vocabulary)
    return offline_tokenizer(text.vocabulary, pad_token=text.pad_token)


def _materialise(module: Any, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a module built on the meta device its storage and seeded weights, one tensor at a time."""
    for owner_name, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                drawn = _draw(owner, owner_name, name, parameter.shape, generator)
                owner._parameters[name] = nn.Parameter(drawn.to(device, dtype), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _positions(owner, buffer).to(device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # T5 has its table of word embeddings twice


def _positions(owner: Any, buffer: torch.Tensor) -> torch.Tensor:
    """The only buffers of these models: CLIP's numbers of positions, and sines of the places of an image's patches."""
    if type(owner).__name__ != "PatchEmbed":
        return torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side, scale = math.isqrt(buffer.shape[1]), owner.interpolation_scale
    table: torch.Tensor = get_2d_sincos_pos_embed(
        buffer.shape[-1], side, base_size=owner.base_size, interpolation_scale=scale, output_type="pt"
    )
    return table.to(buffer.dtype)[None]


def _draw(owner: Any, owner_name: str, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name == "bias":
        return torch.randn(shape, generator=generator) * 0.02
    if len(shape) == 1:  # of a norm
        return 1.0 + 0.1 * torch.randn(shape, generator=generator)
    if isinstance(owner, nn.Embedding):
        return torch.randn(shape, generator=generator) * 0.5
    fan_in = shape[1:].numel()
    return torch.randn(shape, generator=generator) * (_gain(owner_name) / fan_in**0.5)


def _gain(owner_name: str) -> float:
    """How much larger than torch's default the weights of a layer are."""
    if "attn2" in owner_name:
        return _TEXT_GAIN
    if owner_name.endswith("SelfAttention.q"):
        return _T5_QUERY_GAIN
    if owner_name in ("conv_out", "proj_out"):
        return _OUTPUT_GAIN
    return 1.0
