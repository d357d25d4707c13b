"""The components' configurations, one function each: what is trained, and what the committed weights fit into."""

from __future__ import annotations

from typing import Any

from .data import SIDE
from .tokenizer import MAX_LENGTH

LATENT_CHANNELS = 16
LATENT_SIDE = SIDE // 8
TEXT_WIDTH = 128


def vae() -> Any:
    """``AutoencoderKL``, three halvings: 64 x 64 x 3 to 8 x 8 x 16."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def unet() -> Any:
    """``UNet2DConditionModel``, cross-attention at all three resolutions (8, 4, 2): 41 sites."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(128, 160, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def clip(vocabulary: int, bos: int, eos: int) -> Any:
    """``CLIPModel``: the text tower is the pipeline's encoder, the pair of towers the scorer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,  # one a quarter turn: see symmetry.py
        image_size=SIDE,
        patch_size=16,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def scheduler() -> Any:
    """``DDIMScheduler`` for v-prediction, on a schedule that leaves 1.6% of the signal at its last step.

    Stable Diffusion's leaves 6.8%, from which training can read a picture's ground but sampling, which starts at pure
    noise, cannot. "trailing" spacing starts at that last step. PNDM and DPM-Solver take the same configuration.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
