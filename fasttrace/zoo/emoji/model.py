"""Load and save the packaged model: a ``StableDiffusionPipeline``, its scorer and its judge, from ``weights/``."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import ModelError

WEIGHTS = Path(__file__).parent / "weights"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loaders' progress bars and notices; errors still raise. Settings are put back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def _default_device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _present(folder: Path, part: str) -> Path:
    if not (folder / part).exists():
        raise ModelError(
            f"{folder / part} is missing; expected the packaged emoji weights: reinstall fasttrace, or train them "
            "with `python -m fasttrace.zoo.emoji.train`"
        )
    return folder


def load(device: str | torch.device | None = None, dtype: torch.dtype | None = None, *, folder: Path = WEIGHTS) -> Any:
    """The packaged ``StableDiffusionPipeline``: 64 x 64 pictures, latents [16, 8, 8], 24 tokens.

    Args:
        device: the GPU if there is one, else the CPU.
        dtype: fp32 on the CPU and fp16 on a GPU unless given.

    Raises:
        ModelError: the weights are not there.
    """
    target = _default_device(device)
    with quiet():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(_present(folder, "model_index.json"), local_files_only=True)
        pipe = pipe.to(target, dtype or (torch.float32 if target.type == "cpu" else torch.float16))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Scorer:
    """CLIP towers trained on the captioned renderings; embeddings are unit vectors, so a dot product is the score."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer = clip, tokenizer

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], of any size; returns [B, 128], fp32."""
        side = self.clip.config.vision_config.image_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ModelError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W] in [0, 1]")
        images = images.to(self.clip.device, torch.float32)
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pooled = self.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns [B, 128], fp32."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        pooled = self.clip.text_model(input_ids=ids.to(self.clip.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)


def load_scorer(device: str | torch.device | None = None, *, folder: Path = WEIGHTS) -> Scorer:
    """The packaged scorer, fp32.

    Raises:
        ModelError: the weights are not there.
    """
    with quiet():
        from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

        config = CLIPConfig.from_pretrained(_present(folder, "scorer") / "scorer")
        clip = CLIPModel(config)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    rest = load_file(folder / "scorer" / "model.safetensors")
    tower = getattr(text, "text_model", text).state_dict()
    clip.load_state_dict(rest | {f"text_model.{key}": value for key, value in tower.items()})
    return Scorer(clip.eval().requires_grad_(False).to(_default_device(device)), tokenizer)


def assemble(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> Any:
    """A pipeline of components in memory."""
    from . import architecture

    with quiet():
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, architecture.scheduler(), None, None, requires_safety_checker=False
        )


def text_encoder_of(clip: Any) -> Any:
    """``CLIPTextModel`` with the weights of a ``CLIPModel``'s text tower."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel(clip.config.text_config)
    tower = getattr(encoder, "text_model", encoder)
    tower.load_state_dict(clip.text_model.state_dict())
    return encoder.eval().requires_grad_(False)


def export(clip: Any, vae: Any, unet: Any, tokenizer: Any, folder: Path = WEIGHTS) -> None:
    """Write pipeline and scorer in fp16 to ``folder``, replacing what was there; the judge, if any, stays.

    The scorer's text tower is the pipeline's text encoder and is written once.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    halves = [copy.deepcopy(module).half().to(memory_format=torch.contiguous_format) for module in (clip, vae, unet)]
    with quiet():
        assemble(halves[1], text_encoder_of(clip).half(), tokenizer, halves[2]).save_pretrained(part)
    halves[0].config.save_pretrained(part / "scorer")
    rest = {k: v.contiguous() for k, v in halves[0].state_dict().items() if not k.startswith("text_model.")}
    save_file(rest, part / "scorer" / "model.safetensors", metadata={"format": "pt"})
    tower = {f"text_model.{k}": v.contiguous() for k, v in halves[0].text_model.state_dict().items()}
    save_file(tower, part / "text_encoder" / "model.safetensors", metadata={"format": "pt"})  # names as on the hub
    for name in ("vocab.json", "merges.txt"):  # read by versions of transformers before 5
        shutil.copy(Path(tokenizer.name_or_path) / name, part / "tokenizer" / name)
    for path in part.rglob("*.*"):
        path.chmod(0o644)
        if path.suffix == ".json":
            _drop_paths(path)
    if (folder / "judge").exists():
        shutil.move(folder / "judge", part / "judge")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _drop_paths(config: Path) -> None:
    """Remove the note of where a component was loaded from."""
    table = json.loads(config.read_text())
    if isinstance(table, dict) and table.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(table, indent=2) + "\n")
