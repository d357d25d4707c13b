"""Configurations of the true architectures and of their tiny forms, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Everything that a random pipeline is built from; each field is a diffusers or transformers configuration."""

    pipeline: str
    unet: dict[str, Any]
    text: tuple[dict[str, Any], ...]
    vae: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]
    pad_tokens: tuple[str, ...]
    vocabulary: int


_CROSS_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_EOT = "<|endoftext|>"

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_TINY_VAE = {**_VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}

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

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

_SD_SCHEDULE = {**_NOISE, "steps_offset": 1, "set_alpha_to_one": False}

_TRUE = {
    "sd15": Architecture(
        pipeline="StableDiffusionPipeline",
        unet={**_SD_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        text=(_CLIP_L,),
        vae=_VAE,
        scheduler="PNDMScheduler",
        scheduler_config={**_SD_SCHEDULE, "skip_prk_steps": True},
        pad_tokens=(_EOT,),
        vocabulary=49408,
    ),
    "sd21": Architecture(
        pipeline="StableDiffusionPipeline",
        unet={
            **_SD_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        text=(_OPENCLIP_H,),
        vae={**_VAE, "sample_size": 768},
        scheduler="DDIMScheduler",
        scheduler_config={**_SD_SCHEDULE, "clip_sample": False, "prediction_type": "v_prediction"},
        pad_tokens=("!",),
        vocabulary=49408,
    ),
    "sdxl": Architecture(
        pipeline="StableDiffusionXLPipeline",
        unet=_SDXL_UNET,
        text=(_CLIP_L, _BIG_G),
        vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        scheduler="EulerDiscreteScheduler",
        scheduler_config={**_NOISE, "steps_offset": 1, "timestep_spacing": "leading"},
        pad_tokens=(_EOT, "!"),
        vocabulary=49408,
    ),
}

_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
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


def _tiny(full: Architecture, unet: dict[str, Any], text: tuple[dict[str, Any], ...]) -> Architecture:
    return Architecture(
        pipeline=full.pipeline,
        unet={**full.unet, **_TINY_UNET, **unet},
        text=text,
        vae={**_TINY_VAE, "scaling_factor": full.vae.get("scaling_factor", 0.18215)},
        scheduler=full.scheduler,
        scheduler_config=full.scheduler_config,
        pad_tokens=full.pad_tokens,
        vocabulary=1000,
    )


ARCHITECTURES = {
    **_TRUE,
    "tiny-sd15": _tiny(_TRUE["sd15"], {}, (_TINY_TEXT,)),
    "tiny-sd21": _tiny(_TRUE["sd21"], {"attention_head_dim": (2, 4)}, ({**_TINY_TEXT, "hidden_act": "gelu"},)),
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
        (_TINY_TEXT, {**_TINY_TEXT, "hidden_act": "gelu", "projection_dim": 32}),
    ),
}
