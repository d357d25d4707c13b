"""Load and save the packaged transformer; the components that it shares with ``emoji`` are loaded from there."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ModelError
from ..emoji.model import WEIGHTS as EMOJI
from ..emoji.model import quiet

if TYPE_CHECKING:
    from .pipeline import EmojiDiTPipeline

WEIGHTS = Path(__file__).parent / "weights"


def load(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None, *, folder: Path = WEIGHTS
) -> EmojiDiTPipeline:
    """The packaged ``StableDiffusion3Pipeline``: 64 x 64 pictures, latents [16, 8, 8], 24 text tokens.

    Args:
        device: the GPU if there is one, else the CPU.
        dtype: fp32 on the CPU and fp16 on a GPU unless given.

    Raises:
        ModelError: the weights are not there.
    """
    if not (folder / "transformer").exists():
        raise ModelError(
            f"{folder / 'transformer'} is missing; expected the packaged emoji-dit weights: reinstall fasttrace, or "
            "train them with `python -m fasttrace.zoo.emoji_dit.train`"
        )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with quiet():
        from diffusers import SD3Transformer2DModel

        transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
        return assemble(transformer).to(target, dtype or (torch.float32 if target.type == "cpu" else torch.float16))


def assemble(transformer: Any) -> EmojiDiTPipeline:
    """A pipeline of a transformer in memory, on the CPU in fp32, and ``emoji``'s other components."""
    from . import architecture

    with quiet():
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        from .pipeline import EmojiDiTPipeline

        vae = AutoencoderKL.from_pretrained(EMOJI / "vae", local_files_only=True)
        vae.register_to_config(shift_factor=0.0)  # which Stable Diffusion 3's pipeline adds
        pipe = EmojiDiTPipeline(
            transformer=transformer,
            scheduler=architecture.scheduler(),
            vae=vae,
            text_encoder=CLIPTextModel.from_pretrained(EMOJI / "text_encoder", local_files_only=True).float(),
            tokenizer=CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", local_files_only=True),
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(transformer: Any, folder: Path = WEIGHTS) -> None:
    """Write the transformer in fp16 to ``folder``, replacing what was there."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        copy.deepcopy(transformer).half().save_pretrained(part / "transformer")
    for path in part.rglob("*.*"):
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
