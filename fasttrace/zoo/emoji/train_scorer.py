"""Stage ``scorer``: the two CLIP towers, contrastively; the text tower is then the pipeline's frozen text encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import architecture, symmetry
from .data import NAMES, SIZES, Scene, is_held_out, random_caption, training_scenes
from .muon import Muon
from .tokenizer import MAX_LENGTH
from .train_vae import pictures
from .training import Loop


class Towers(nn.Module):
    """Both towers and, to give them a quick start, linear readers of every attribute on each embedding."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.projection_dim
        self.text_readers = nn.ModuleList(nn.Linear(width, size) for size in SIZES)
        self.image_readers = nn.ModuleList(nn.Linear(width, size) for size in SIZES)

    def forward(self, ids: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """InfoNCE in both directions plus the readers' cross-entropies.

        ids [B, T], images [B, 3, H, W] in [-1, 1], labels [B, 6].
        """
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output).float()
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output).float()
        logits = (
            self.clip.logit_scale.clamp(max=4.6052).exp() * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
        )
        same = (labels[:, None] == labels[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        for readers, embedding in ((self.text_readers, text), (self.image_readers, image)):
            for i, reader in enumerate(readers):
                loss = loss + 0.2 * F.cross_entropy(reader(embedding), labels[:, i])
        return loss


def group(scene: Scene, rng: random.Random) -> list[Scene]:
    """The scene and, per attribute, one training scene that differs from it in that attribute alone."""
    scenes = [scene]
    for name, size in zip(NAMES, SIZES, strict=True):
        others = [scene.change(name, i) for i in range(size) if i != scene.labels[NAMES.index(name)]]
        others = [other for other in others if not is_held_out(other)]
        if others:
            scenes.append(rng.choice(others))
    return scenes


def augment(images: Tensor) -> Tensor:
    """Shift by up to 2 pixels, blur two in three, add a little noise: what is drawn is less clean than a rendering.

    Each picture has a shift of its own: batch normalisation would learn one that a batch shares from its statistics.
    """
    shifts = torch.randint(-2, 3, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, blurred, (1.5 * torch.rand(len(images), 1, 1, 1) - 0.5).clamp(min=0))
    return images + torch.randn_like(images) * 0.1 * torch.rand(len(images), 1, 1, 1)


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids [B, 24]."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")[
        "input_ids"
    ]
    assert isinstance(ids, Tensor)
    return ids


def train(
    tokenizer: Any,
    work: Path,
    minutes: float,
    *,
    start: Any = None,
    image_only: bool = False,
    resume: bool = False,
    bases: int = 18,
    max_steps: int | None = None,
) -> Any:
    """Train the towers, from ``start`` or from nothing, and return the ``CLIPModel``.

    With ``image_only`` the text tower up to its projection is kept as it is, for a denoiser has learnt to read it.
    """
    torch.manual_seed(0)
    clip = start or architecture.clip(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    clip.set_attn_implementation("eager")  # its backward pass is several times as fast on a CPU
    model = Towers(clip.requires_grad_(True)).train()
    symmetry.impose(clip.vision_model)
    symmetry.keep(clip.vision_model)
    if image_only:
        clip.text_model.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tables = [p for name, p in named if "embedding" in name and p.ndim == 2]
    others = [p for name, p in named if not ("embedding" in name and p.ndim == 2)]
    groups: list[dict[str, Any]] = [{"params": tables, "orthogonal": False}, {"params": others}]
    optimizer = Muon([group for group in groups if group["params"]], lr=1e-3, weight_decay=0.05)
    loop = Loop("scorer", model, optimizer, work, minutes, resume=resume, decay=0.995, max_steps=max_steps)
    rng = random.Random(loop.step)
    scenes = training_scenes()
    for _ in loop:
        batch = [other for scene in rng.choices(scenes, k=bases) for other in group(scene, rng)]
        ids = encode(tokenizer, [random_caption(scene, rng).text for scene in batch])
        images = augment(pictures(batch, rng))
        labels = torch.tensor([scene.labels for scene in batch])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, images, labels)
        loop.backward(loss)
    loop.load_average()
    symmetry.impose(clip.vision_model)
    clip.set_attn_implementation("sdpa")
    return clip.eval().requires_grad_(False)
