"""The judge: a small convolutional classifier that reads every attribute off a picture.

It is trained on renderings only, never on or with the generator, and takes no part in the pipeline. A fifth of all
scenes, chosen without regard to what the generator trains on, is kept from it to measure it on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import ModelError
from .data import ATTRIBUTES, NAMES, SIZES, Scene, all_scenes, layouts, render_all
from .model import WEIGHTS
from .train_scorer import augment
from .train_vae import pictures
from .training import Loop, replace_text, save_tensors

WIDTHS = (32, 64, 96, 128)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] to logits: attribute name to [B, number of values]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(WIDTHS):
            layers += [nn.Conv2d(before, width, 3 if i else 5, stride=2, padding=1 if i else 2, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [Residual(width)] if i else []
            before = width
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(before, size) for name, size in zip(NAMES, SIZES, strict=True)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images * 2 - 1).float().mean(dim=(2, 3))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """What each picture shows, in the attributes' own words."""
        logits = self(images)
        best = {name: logits[name].argmax(-1).tolist() for name in NAMES}
        return [{name: ATTRIBUTES[name][best[name][i]] for name in NAMES} for i in range(len(images))]

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """[B, 6], the most likely value of each attribute in the order of ``data.NAMES``."""
        logits = self(images)
        return torch.stack([logits[name].argmax(-1) for name in NAMES], dim=1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        return {name: value.softmax(-1) for name, value in self(images).items()}


def split() -> tuple[list[Scene], list[Scene]]:
    """The judge's own training scenes and test scenes, four to one."""
    scenes = list(all_scenes())
    random.Random(1).shuffle(scenes)
    fifth = len(scenes) // 5
    return scenes[fifth:], scenes[:fifth]


def train(work: Path, minutes: float, *, resume: bool = False, batch: int = 64, max_steps: int | None = None) -> Judge:
    """Train on renderings, shifted, blurred and noised a little."""
    torch.manual_seed(0)
    model = Judge().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    loop = Loop("judge", model, optimizer, work, minutes, resume=resume, decay=0.99, max_steps=max_steps)
    rng = random.Random(loop.step)
    scenes, _ = split()
    for _ in loop:
        chosen = rng.choices(scenes, k=batch)
        images = augment(pictures(chosen, rng)).add(1).div(2).contiguous(memory_format=torch.channels_last)
        labels = torch.tensor([scene.labels for scene in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loop.backward(sum((F.cross_entropy(logits[n], labels[:, i]) for i, n in enumerate(NAMES)), torch.zeros(())))
    loop.load_average()
    return model.eval().requires_grad_(False)


def accuracy(judge: Judge, scenes: list[Scene], seed: int = 0) -> dict[str, tuple[int, int]]:
    """Right answers and pictures, per attribute, on clean renderings of the scenes."""
    rng = random.Random(seed)
    right = np.zeros(len(NAMES), int)
    for start in range(0, len(scenes), 100):
        part = scenes[start : start + 100]
        images = torch.from_numpy(render_all(part, [rng.randrange(layouts(scene)) for scene in part]))
        found = judge.labels(images.permute(0, 3, 1, 2).float() / 255).numpy()
        right += (found == np.asarray([scene.labels for scene in part])).sum(0)
    return {name: (int(right[i]), len(scenes)) for i, name in enumerate(NAMES)}


def save_judge(judge: Judge, folder: Path = WEIGHTS) -> None:
    """fp16 safetensors, and what each head's classes are."""
    target = folder / "judge"
    target.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_tensors(state, target / "model.safetensors")
    replace_text(target / "config.json", json.dumps({"classes": ATTRIBUTES}, indent=1) + "\n")


def load_judge(device: Any = None, *, folder: Path = WEIGHTS) -> Judge:
    """The packaged judge, fp32.

    Raises:
        ModelError: the weights are not there.
    """
    path = folder / "judge" / "model.safetensors"
    if not path.exists():
        raise ModelError(f"{path} is missing; train it with `python -m fasttrace.zoo.emoji.train --stage judge`")
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False).to(device or "cpu")
