"""The transformer and its scheduler; the autoencoder, the text encoder and the tokenizer are ``emoji``'s own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..emoji.architecture import LATENT_CHANNELS, LATENT_SIDE, TEXT_WIDTH

BLOCKS, HEADS, HEAD_WIDTH = 7, 5, 32


def transformer() -> Any:
    """``SD3Transformer2DModel``: 7 joint blocks, 160 wide, over 64 image tokens and 24 text tokens; 6.3 M parameters.

    Every block starts as the identity and the output at zero (Peebles & Xie 2023, "Scalable diffusion models with
    transformers", adaLN-Zero), which diffusers leaves to the trainer.
    """
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        out_channels=LATENT_CHANNELS,
        pos_embed_max_size=LATENT_SIDE,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def scheduler() -> Any:
    """``FlowMatchEulerDiscreteScheduler``, shifted to the noisy end, where the words decide what a picture becomes."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=2.0)
