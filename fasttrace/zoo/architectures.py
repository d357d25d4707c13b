"""Configurations of the true architectures with a UNet and of their tiny forms, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and its tokenizer.

    Attributes:
        model: class in transformers, with a configuration and a vocabulary.
        pad_token: of CLIP's tokenizer.
    """

    model: str
    config: dict[str, Any]
    vocabulary: int
    pad_token: str = "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """Everything that a random pipeline is built from; models are classes of diffusers with their configurations.

    Attributes:
        denoiser: ``("unet" or "transformer", class)``.
        latents: width of the latents where the pipeline does not read it from the denoiser's configuration.
    """

    pipeline: str
    denoiser: tuple[str, str]
    denoiser_config: dict[str, Any]
    text: tuple[TextEncoder, ...]
    vae: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]
    latents: int | None = None


_UNET = ("unet", "UNet2DConditionModel")
_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}

_SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _CROSS_DOWN,
    "up_block_types": _CROSS_UP,
}
_SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

_SD_SCHEDULE = {**_NOISE, "steps_offset": 1, "set_alpha_to_one": False}

CLIP_VOCABULARY, TINY_VOCABULARY = 49408, 1000


def clip(config: dict[str, Any], projected: bool = False, pad_token: str = "<|endoftext|>") -> TextEncoder:
    """A CLIP text encoder."""
    return TextEncoder(
        "CLIPTextModelWithProjection" if projected else "CLIPTextModel", config, CLIP_VOCABULARY, pad_token
    )


_TRUE = {
    "sd15": Architecture(
        pipeline="StableDiffusionPipeline",
        denoiser=_UNET,
        denoiser_config={**_SD_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        text=(clip(CLIP_L),),
        vae=VAE,
        scheduler="PNDMScheduler",
        scheduler_config={**_SD_SCHEDULE, "skip_prk_steps": True},
    ),
    "sd21": Architecture(
        pipeline="StableDiffusionPipeline",
        denoiser=_UNET,
        denoiser_config={
            **_SD_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        text=(clip(_OPENCLIP_H, pad_token="!"),),
        vae={**VAE, "sample_size": 768},
        scheduler="DDIMScheduler",
        scheduler_config={**_SD_SCHEDULE, "clip_sample": False, "prediction_type": "v_prediction"},
    ),
    "sdxl": Architecture(
        pipeline="StableDiffusionXLPipeline",
        denoiser=_UNET,
        denoiser_config=_SDXL_UNET,
        text=(clip(CLIP_L), clip(CLIP_G, projected=True, pad_token="!")),
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        scheduler="EulerDiscreteScheduler",
        scheduler_config={**_NOISE, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
}

TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TINY_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}


def _tiny(full: Architecture, unet: dict[str, Any], *text: dict[str, Any]) -> Architecture:
    return replace(
        full,
        denoiser_config={**full.denoiser_config, **_TINY_UNET, **unet},
        text=tiny_texts(full, *text),
        vae={**TINY_VAE, "scaling_factor": full.vae.get("scaling_factor", 0.18215)},
    )


def tiny_texts(full: Architecture, *configs: dict[str, Any]) -> tuple[TextEncoder, ...]:
    """The text encoders of an architecture in small."""
    pairs = zip(full.text, configs, strict=True)
    return tuple(replace(text, config=config, vocabulary=TINY_VOCABULARY) for text, config in pairs)


UNETS = {
    **_TRUE,
    "tiny-sd15": _tiny(_TRUE["sd15"], {}, TINY_CLIP),
    "tiny-sd21": _tiny(_TRUE["sd21"], {"attention_head_dim": (2, 4)}, {**TINY_CLIP, "hidden_act": "gelu"}),
    "tiny-sdxl": _tiny(
        _TRUE["sdxl"],
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        TINY_CLIP,
        {**TINY_CLIP, "hidden_act": "gelu", "projection_dim": 32},
    ),
}
