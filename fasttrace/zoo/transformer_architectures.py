"""Configurations of the true diffusion transformers and of their tiny forms, as plain data.

As released: stabilityai/stable-diffusion-3-medium and -3.5-medium and -3.5-large, black-forest-labs/FLUX.1-dev, and
PixArt-alpha/PixArt-Sigma-XL-2-1024-MS.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architectures import CLIP_G, CLIP_L, TINY_CLIP, TINY_VAE, VAE, Architecture, TextEncoder, clip, tiny_texts

_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
_T5 = TextEncoder("T5EncoderModel", _T5_XXL, 32128)

# Autoencoders of flow-matching models: 16 channels, and no convolution around the latents.
_FLOW_VAE = {**VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
_SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD3 = Architecture(
    pipeline="StableDiffusion3Pipeline",
    denoiser=("transformer", "SD3Transformer2DModel"),
    denoiser_config=_SD3_TRANSFORMER,
    text=(clip({**CLIP_L, "projection_dim": 768}, projected=True), clip(CLIP_G, projected=True, pad_token="!"), _T5),
    vae={**_FLOW_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 3.0},
)
_TRUE = {
    "sd3": _SD3,
    "sd35-medium": replace(
        _SD3,
        denoiser_config={
            **_SD3_TRANSFORMER,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 384,
        },
    ),
    "sd35-large": replace(
        _SD3,
        denoiser_config={
            **_SD3_TRANSFORMER,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
    ),
    "flux": Architecture(
        pipeline="FluxPipeline",
        denoiser=("transformer", "FluxTransformer2DModel"),
        denoiser_config={"guidance_embeds": True},
        text=(clip(CLIP_L), _T5),
        vae={**_FLOW_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        scheduler="FlowMatchEulerDiscreteScheduler",
        scheduler_config={"shift": 3.0, "use_dynamic_shifting": True},
        latents=128,
    ),
    "pixart-sigma": Architecture(
        pipeline="PixArtSigmaPipeline",
        denoiser=("transformer", "PixArtTransformer2DModel"),
        denoiser_config={"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        text=(_T5,),
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        scheduler="DPMSolverMultistepScheduler",
        scheduler_config={"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ),
}

_TINY_T5 = {**_T5_XXL, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 3}
_PROJECTED = {**TINY_CLIP, "projection_dim": 32}


def _tiny(full: Architecture, transformer: dict[str, Any], *text: dict[str, Any]) -> Architecture:
    kept = ("latent_channels", "scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv")
    return replace(
        full,
        denoiser_config={**full.denoiser_config, **transformer},
        text=tiny_texts(full, *text),
        vae={**TINY_VAE, **{name: full.vae[name] for name in kept if name in full.vae}},
        latents=full.latents and 8,
    )


_TINY_SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 12,
}
_TINY_SD3_TEXTS = (_PROJECTED, {**_PROJECTED, "hidden_act": "gelu"}, _TINY_T5)

TRANSFORMERS = {
    **_TRUE,
    "tiny-sd3": _tiny(_TRUE["sd3"], _TINY_SD3, *_TINY_SD3_TEXTS),
    "tiny-sd35": _tiny(_TRUE["sd35-medium"], {**_TINY_SD3, "dual_attention_layers": (0, 1)}, *_TINY_SD3_TEXTS),
    "tiny-flux": _tiny(
        _TRUE["flux"],
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        TINY_CLIP,
        _TINY_T5,
    ),
    # The pipeline knows widths of 32, 64, 128 and 256.
    "tiny-pixart": _tiny(
        _TRUE["pixart-sigma"],
        {
            "sample_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 64,
            "interpolation_scale": 1,
        },
        _TINY_T5,
    ),
}
