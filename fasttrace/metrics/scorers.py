"""Judges of pictures: a CLIP of its own, frozen and apart from the pipeline, so that no edit can change the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MetricError

_BATCH = 64


class Scorer(Protocol):
    """Two towers into one space; both return unit vectors ``[N, D]``."""

    def image_features(self, images: Tensor) -> Tensor:
        """Of pictures ``[N, 3, H, W]`` in [0, 1]."""

    def text_features(self, texts: list[str]) -> Tensor:
        """Of captions."""


def clip_scores(scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    """100 x the cosine of each picture with its prompt, ``[N]`` (Hessel et al. 2021, without the clamp at zero)."""
    distinct = sorted(set(prompts))
    texts = dict(zip(distinct, scorer.text_features(distinct), strict=True))
    scores = []
    for start in range(0, len(prompts), _BATCH):
        pictures = scorer.image_features(images[start : start + _BATCH])
        captions = torch.stack([texts[prompt] for prompt in prompts[start : start + _BATCH]])
        scores.append(100 * (pictures * captions).sum(-1).float())
    return torch.cat(scores) if scores else torch.empty(0)


def find_scorer(pipe: Any, judge: str) -> Scorer:
    """The packaged scorer if ``judge`` is empty or ``"emoji"``, else a CLIP of transformers from a folder or the hub.

    Raises:
        MetricError: no judge named for a pipeline that does not read the packaged model's vocabulary, or none can be
            loaded.
    """
    if judge not in ("", "emoji"):
        return HubClip(judge, pipe.unet.device)
    from ..zoo import emoji

    scorer = emoji.load_scorer(pipe.unet.device)
    # Edited, fine-tuned and saved copies of the packaged model keep its tokenizer, whatever else they change.
    if not judge and pipe.tokenizer.get_vocab() != scorer.tokenizer.get_vocab():
        raise MetricError(
            "clip_score alone means the packaged model's own scorer, which knows nothing of this model's pictures: "
            'name a CLIP, as in "clip_score:openai/clip-vit-large-patch14" or "clip_score:/a/folder", or use '
            "latent_cosine or latent_l2"
        )
    return scorer


class HubClip:
    """A ``CLIPModel`` of transformers, in float32.

    Args:
        name: a folder or hub id.
        device: where it runs.

    Raises:
        MetricError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            self._model = CLIPModel.from_pretrained(name, use_safetensors=True).float().eval().requires_grad_(False)
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers and the hub raise many types for a model that is not there
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MetricError(
                f"no CLIP in {name!r} ({reason}): expected a CLIPModel's folder or hub id after clip_score:"
            ) from error
        self._model.to(device)
        self._device = device
        self._mean, self._std = _normalisation(name)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Pictures are scaled so that the shorter side fits (bicubic, antialiased), then cut to the centre square."""
        side = self._model.config.vision_config.image_size
        height, width = images.shape[-2:]
        scale = side / min(height, width)
        size = (max(side, int(height * scale)), max(side, int(width * scale)))  # rounded as transformers rounds
        pictures = F.interpolate(images.float().to(self._device), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pictures = pictures[..., top : top + side, left : left + side]
        mean, std = (torch.tensor(v, device=self._device).reshape(3, 1, 1) for v in (self._mean, self._std))
        pooled = self._model.vision_model(pixel_values=(pictures - mean) / std).pooler_output
        return F.normalize(self._model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"].to(self._device), attention_mask=tokens["attention_mask"].to(self._device)
        ).pooler_output
        return F.normalize(self._model.text_projection(pooled), dim=-1)


def _normalisation(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels, from the model's preprocessor file; CLIP's own if it has none."""
    from transformers.utils import cached_file
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    config = json.loads(Path(file).read_text()) if file else {}
    return list(config.get("image_mean", OPENAI_CLIP_MEAN)), list(config.get("image_std", OPENAI_CLIP_STD))
