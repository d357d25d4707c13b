"""Getting a pipeline, and what tracing needs of one: the shape of its latents, texts encoded, latents decoded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError


def load_pipeline(name: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A diffusers text-to-image pipeline, ready to trace.

    Args:
        name: ``"emoji"`` or ``"emoji-dit"`` for the packaged UNet or transformer, a form of
            `fasttrace.zoo.random_pipeline` with the prefix ``"random:"`` (``"random:tiny-sd15"``), a local folder in
            diffusers' layout, or a hub id.
        device: the GPU if there is one, else the CPU.
        dtype: float16 on a GPU, float32 on a CPU.

    Raises:
        ModelError: nothing of that name can be loaded; the message says what was tried.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if name == "emoji":
        from .zoo import emoji

        return emoji.load(device=device, dtype=dtype)
    if name == "emoji-dit":
        from .zoo import emoji_dit

        return emoji_dit.load(device=device, dtype=dtype)
    if name.startswith("random:"):
        from .zoo import random_pipeline

        return random_pipeline(name.removeprefix("random:"), device=device, dtype=dtype)
    from diffusers import DiffusionPipeline

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and name.startswith((".", "/", "~")):
        raise ModelError(f"no folder {name!r}: expected a diffusers folder with a model_index.json")
    if local and not (folder / "model_index.json").is_file():
        raise ModelError(f"folder {name!r} has no model_index.json: expected a pipeline saved by diffusers")
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype}
    if not local and os.environ.get("HF_HUB_OFFLINE"):
        options["local_files_only"] = True
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder) if local else name, **options)
    except Exception as error:  # diffusers and the hub raise many types for a model that is not there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f'cannot load {name!r} ({reason}): expected "emoji", "random:tiny-sd15", a diffusers folder, or a hub id'
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_traceable(pipe: Any) -> None:
    """Refuse, with the reason, a pipeline whose UNet the engines cannot drive.

    Raises:
        ModelError: no ``UNet2DConditionModel``, inputs beyond the latents (inpainting), or a part that is offloaded.
    """
    unet: Any = getattr(pipe, "unet", None)
    if type(unet).__name__ != "UNet2DConditionModel":
        found = type(unet).__name__ if unet is not None else "no unet"
        raise ModelError(f"{type(pipe).__name__} has {found}: expected a UNet2DConditionModel (SD1.x, SD2.x, SDXL)")
    latent_channels = (
        pipe.vae.config.latent_channels if getattr(pipe, "vae", None) is not None else unet.config.in_channels
    )
    if unet.config.in_channels != latent_channels:
        raise ModelError(
            f"the UNet takes {unet.config.in_channels} channels and the latents have {latent_channels}: inpainting and "
            "image-conditioned models are not supported; use a text-to-image UNet"
        )
    refuse_offloaded(pipe)


def refuse_offloaded(pipe: Any) -> None:
    """Refuse a pipeline of which a denoiser or text encoder is moved in and out by accelerate.

    Raises:
        ModelError: which part it is, and how to bring it back.
    """
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipe, part, None)
        if isinstance(module, nn.Module) and hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{part} is offloaded by accelerate: call pipe.remove_all_hooks() and pipe.to(device) first"
            )


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """``(C, h, w)`` of the latents at the model's own size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, int(height), int(width)


@dataclass(frozen=True)
class Condition:
    """What a denoiser is conditioned on besides the time, as the pipeline's ``encode_prompt`` makes it of one prompt.

    Attributes:
        embeds: text states, ``[T, D]``.
        pooled: pooled text embedding ``[P]`` of SDXL, SD3 and FLUX, else ``None``.
        time_ids: SDXL's six sizes ``[6]``, else ``None``.
        mask: PixArt's ``[T]``, 1 where a token counts; ``None`` where all do.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        time_ids = None if self.time_ids is None else self.time_ids.to(device, dtype)
        mask = None if self.mask is None else self.mask.to(device)
        return Condition(self.embeds.to(device, dtype), pooled, time_ids, mask)


@dataclass(frozen=True)
class Conditions:
    """Several conditions, one a row.

    Attributes:
        embeds: ``[K, T, D]``.
        pooled: ``[K, P]``, or ``None``.
        time_ids: ``[K, 6]``, or ``None``.
        mask: ``[K, T]``, or ``None``.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def of(rows: Sequence[Condition]) -> Conditions:
        """Rows that all have the same parts."""

        def stacked(parts: list[Tensor | None]) -> Tensor | None:
            there = [part for part in parts if part is not None]
            return torch.stack(there) if there else None

        return Conditions(
            torch.stack([row.embeds for row in rows]),
            stacked([row.pooled for row in rows]),
            stacked([row.time_ids for row in rows]),
            stacked([row.mask for row in rows]),
        )

    def __getitem__(self, rows: Tensor) -> Conditions:
        """The conditions of some rows ``[B]``."""

        def taken(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows]

        return Conditions(self.embeds[rows], taken(self.pooled), taken(self.time_ids), taken(self.mask))

    def added(self) -> dict[str, Tensor] | None:
        """SDXL's added conditions, by the names that diffusers gives them."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}


def needs_added(pipe: Any) -> bool:
    """Whether the UNet takes SDXL's added conditions."""
    return pipe.unet.config.addition_embed_type == "text_time"


def default_time_ids(pipe: Any) -> Tensor:
    """SDXL's ``(original size, crop, target size)`` for an uncropped picture of the model's own size, ``[6]``."""
    _, h, w = latent_shape(pipe)
    height, width = h * pipe.vae_scale_factor, w * pipe.vae_scale_factor
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def timestep_condition(pipe: Any, guidance_scale: float) -> Tensor | None:
    """The guidance scale as an embedding ``[1, E]`` for UNets that take it as an input (LCM), else ``None``."""
    unet = pipe.unet
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    embedding: Tensor = pipe.get_guidance_scale_embedding(torch.tensor([guidance_scale - 1]), embedding_dim=width)
    return embedding.to(unet.device, unet.dtype)


@torch.no_grad()
def encode_prompt(pipe: Any, text: str) -> Condition:
    """The condition that the pipeline itself would use for a prompt."""
    device = pipe.unet.device
    if needs_added(pipe):
        embeds, _, pooled, _ = pipe.encode_prompt(
            text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition(embeds[0], pooled[0], default_time_ids(pipe).to(device, embeds.dtype))
    embeds, _ = pipe.encode_prompt(text, device, 1, False)
    return Condition(embeds[0])


@torch.no_grad()
def encode_negative(pipe: Any, text: str = "") -> Condition:
    """The condition of the unconditional branch; for SDXL's empty prompt zeros, where the pipeline says so."""
    condition = encode_prompt(pipe, text)
    if not text and needs_added(pipe) and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        assert condition.pooled is not None
        return Condition(torch.zeros_like(condition.embeds), torch.zeros_like(condition.pooled), condition.time_ids)
    return condition


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor, batch: int = 16) -> Tensor:
    """Pictures of final latents.

    Args:
        latents: ``[N, C, h, w]``, at least one.
        batch: latents decoded at once.

    Returns:
        ``[N, 3, H, W]`` float32 in [0, 1] on the CPU.
    """
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    with upcast_vae(pipe):
        dtype = next(pipe.vae.parameters()).dtype
        pictures = [
            pipe.vae.decode((part.to(dtype) / config.scaling_factor + shift).to(pipe.vae.device), return_dict=False)[0]
            for part in torch.split(latents, batch)
        ]
    return (torch.cat(pictures).float().cpu() / 2 + 0.5).clamp(0, 1)


@contextlib.contextmanager
def upcast_vae(pipe: Any) -> Iterator[None]:
    """Decode in float32 where the VAE overflows in half precision (SDXL's ``force_upcast``), and go back afterwards."""
    dtype = next(pipe.vae.parameters()).dtype
    upcast = dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False)
    if upcast:
        pipe.vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            pipe.vae.to(dtype)
