"""Pipelines of the true architectures with seeded random weights: for correctness, and for the cost of true shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .architectures import ARCHITECTURES, Architecture
from .offline_tokenizer import offline_tokenizer

# How much larger than torch's default the cross-attention weights are, so that a change of text changes the picture.
_TEXT_GAIN = 3.0
# RMS of the UNet's output: a small one keeps a trajectory well conditioned, since rounding errors are not amplified.
_OUTPUT_GAIN = 0.3


def random_pipeline(
    name: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """A diffusers pipeline with random weights; the same name and seed give the same weights everywhere.

    Args:
        name: ``"sd15"``, ``"sd21"`` or ``"sdxl"`` for the true shapes (859,520,964, 865,910,724 and 2,567,463,684 UNet
            parameters), or their ``"tiny-"`` forms (8 x 8 latents, widths 16 and 32, three text layers).
        seed: seed of the weights.
        dtype: of all weights. Draws are made in float32, so dtypes agree up to rounding.
        device: of all weights. ``"meta"`` builds the architecture without any storage.

    Raises:
        ModelError: another name.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"no random pipeline {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**architecture.unet)
        vae = diffusers.AutoencoderKL(**architecture.vae)
        encoders = []
        for index, config in enumerate(architecture.text):
            eos = architecture.vocabulary - 1
            text_config = CLIPTextConfig(
                **config, vocab_size=architecture.vocabulary, bos_token_id=eos - 1, eos_token_id=eos, pad_token_id=eos
            )
            encoders.append((CLIPTextModelWithProjection if index else CLIPTextModel)(text_config))
    generator = torch.Generator().manual_seed(seed)
    for module in (unet, vae, *encoders):
        if torch.device(device).type != "meta":
            _materialise(module, generator, dtype, device)
        module.eval().requires_grad_(False)
    return _assemble(architecture, unet, vae, encoders)


def _assemble(architecture: Architecture, unet: nn.Module, vae: nn.Module, encoders: list[nn.Module]) -> Any:
    import diffusers

    tokenizers = [offline_tokenizer(architecture.vocabulary, pad_token=pad) for pad in architecture.pad_tokens]
    scheduler = getattr(diffusers, architecture.scheduler)(**architecture.scheduler_config)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if architecture.pipeline == "StableDiffusionXLPipeline":
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizers[1], "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, architecture.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _materialise(module: nn.Module, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a module built on the meta device its storage and seeded weights, one tensor at a time."""
    for owner_name, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                drawn = _draw(owner, owner_name, name, parameter.shape, generator)
                owner._parameters[name] = nn.Parameter(drawn.to(device, dtype), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                # The only buffers of these models are CLIP's position ids.
                owner._buffers[name] = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).clone()


def _draw(owner: nn.Module, owner_name: str, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name == "bias":
        return torch.randn(shape, generator=generator) * 0.02
    if isinstance(owner, nn.LayerNorm | nn.GroupNorm):
        return 1.0 + 0.1 * torch.randn(shape, generator=generator)
    if isinstance(owner, nn.Embedding):
        return torch.randn(shape, generator=generator) * 0.5
    fan_in = shape[1:].numel()
    gain = 1.0
    if "attn2" in owner_name:
        gain = _TEXT_GAIN
    elif owner_name == "conv_out":
        gain = _OUTPUT_GAIN
    return torch.randn(shape, generator=generator) * (gain / fan_in**0.5)
