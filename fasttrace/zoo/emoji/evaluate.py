"""Measure the packaged model: ``python -m fasttrace.zoo.emoji.evaluate [--out DIR]``.

Both shares that the model has to reach, of pictures read as their caption says and of captions preferred by the scorer,
are on combinations of attributes that were held out of training, and carry Wilson's 95% interval. The judge reads the
pictures; how well it reads renderings that it has not seen stands beside.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import judge as judging
from . import model, noise_check
from .data import (
    ATTRIBUTES,
    FULL_TEMPLATES,
    NAMES,
    NO_COLOUR,
    Scene,
    broken_pairs,
    caption,
    held_out_scenes,
    layouts,
    render_all,
    training_scenes,
)
from .drawing import Settings, choose, generate, labels_of, text_states
from .training import replace_text

BARS = {"object": 0.85, "style": 0.85, "colour": 0.90, "count": 0.80, "background": 0.95, "pose": 0.80}


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def attribute_table(reader: judging.Judge, images: Tensor, scenes: Sequence[Scene]) -> dict[str, tuple[int, int]]:
    """Per attribute, the pictures of which the judge reads what the caption says, and all pictures."""
    right = (reader.labels(images) == labels_of(scenes)).sum(0).tolist()
    return {name: (right[i], len(scenes)) for i, name in enumerate(NAMES)}


def pair_table(
    reader: judging.Judge, images: Tensor, scenes: Sequence[Scene], least: int = 10
) -> dict[str, dict[str, tuple[int, int]]]:
    """The attribute table of the pictures held out on account of each pair of values, if there are enough of them.

    A picture may count in several. The pairs of the object with one other attribute are taken together.
    """
    members: dict[str, list[int]] = {}
    for i, scene in enumerate(scenes):
        for a, b in broken_pairs(scene):
            name = f"an object and its unseen {b}" if a == "object" else f"{scene.values[a]}, {scene.values[b]}"
            members.setdefault(name, []).append(i)
    return {
        name: attribute_table(reader, images[rows], [scenes[i] for i in rows])
        for name, rows in sorted(members.items(), key=lambda item: -len(item[1]))
        if len(rows) >= least
    }


@torch.no_grad()
def autoencoder_table(vae: Any, reader: judging.Judge, number: int, seed: int = 0) -> dict[str, Any]:
    """What the autoencoder alone leaves of held-out renderings: the most that any denoiser's pictures could show.

    Returns:
        ``psnr``: style to decibels; ``read``: attribute to how many of them the judge still reads, and all.
    """
    rng = random.Random(seed)
    scenes = rng.sample(held_out_scenes(), number)
    images = torch.from_numpy(render_all(scenes, [rng.randrange(layouts(scene)) for scene in scenes]))
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in torch.split(images, 50)]
    kept = torch.cat(parts)
    error = ((kept - images) / 2).square().mean(dim=(1, 2, 3))
    style = torch.tensor([scene.style for scene in scenes])
    psnr = {name: float(-10 * error[style == i].mean().log10()) for i, name in enumerate(ATTRIBUTES["style"])}
    return {"psnr": psnr, "read": attribute_table(reader, (kept + 1) / 2, scenes)}


def other_value(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with one attribute changed; a colour never to or from none, so that captions differ in one word."""
    here = scene.labels[NAMES.index(attribute)]
    values = [i for i, value in enumerate(ATTRIBUTES[attribute]) if i != here and value != NO_COLOUR]
    return scene.change(attribute, rng.choice(values))


def clip_preference(scorer: model.Scorer, number: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """On held-out renderings: how often the right caption scores above one with a single attribute changed."""
    rng = random.Random(seed)
    found = {}
    for name in NAMES:
        pool = [s for s in held_out_scenes() if name != "colour" or s.values["colour"] != NO_COLOUR]
        scenes = rng.sample(pool, number)
        images = torch.from_numpy(render_all(scenes, [rng.randrange(layouts(scene)) for scene in scenes]))
        pictures = scorer.image_features(images.permute(0, 3, 1, 2).float() / 255)
        template = [rng.randrange(FULL_TEMPLATES) for _ in scenes]
        right = scorer.text_features([caption(s, t).text for s, t in zip(scenes, template, strict=True)])
        changed = [caption(other_value(s, name, rng), t).text for s, t in zip(scenes, template, strict=True)]
        wrong = scorer.text_features(changed)
        found[name] = (int(((pictures * right).sum(-1) > (pictures * wrong).sum(-1)).sum()), number)
    return found


def contact_sheet(images: Tensor, captions: Sequence[str], path: Path, columns: int = 6, zoom: int = 2) -> None:
    """A grid of pictures with their captions under them, PNG."""
    side, line = 64 * zoom, 11
    width = side + 24
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (side + 5 * line)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * width, i // columns * (side + 5 * line)
        pixels = (image.permute(1, 2, 0).cpu().numpy() * 255 + 0.5).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x + 12, y + 2))
        for k, part in enumerate(_wrap(text, 25)[:4]):
            pen.text((x + 12, y + side + 3 + k * line), part, fill="black")
    sheet.save(path, optimize=True)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def pair_lines(pairs: dict[str, dict[str, tuple[int, int]]]) -> list[str]:
    """``pair_table``'s in Markdown, one line each."""
    lines = ["| held-out pair | pictures | " + " | ".join(NAMES) + " |", "|---|---|" + "---|" * len(NAMES)]
    for pair, table in pairs.items():
        shares = " | ".join(f"{right / total:.0%}" for right, total in table.values())
        lines.append(f"| {pair} | {table['object'][1]} | {shares} |")
    return lines


def report(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = [
        "| attribute | pictures, held out | 95% | bar | pictures, trained on | judge on renderings | "
        "CLIP prefers the right caption | 95% |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        share = {key: found[key][name][0] / found[key][name][1] for key in ("held_out", "trained", "judge", "clip")}
        within = {key: "{:.1%} to {:.1%}".format(*wilson(*found[key][name])) for key in ("held_out", "clip")}
        lines.append(
            f"| {name} | {share['held_out']:.1%} | {within['held_out']} | {BARS[name]:.0%} | {share['trained']:.1%} "
            f"| {share['judge']:.1%} | {share['clip']:.1%} | {within['clip']} |"
        )
    lines += ["", *pair_lines(found["held_out_pairs"])]
    kept = ", ".join(f"{decibels:.1f} dB in {style}" for style, decibels in found["autoencoder"]["psnr"].items())
    read = ", ".join(f"{name} {right / total:.1%}" for name, (right, total) in found["autoencoder"]["read"].items())
    lines += ["", f"The autoencoder alone keeps {kept}; through it the judge reads {read}."]
    if "noise" in found:
        lines += noise_check.report(found["noise"])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emoji-evaluation"))
    parser.add_argument("--weights", type=Path, default=model.WEIGHTS)
    parser.add_argument("--pictures", type=int, default=504, help="held-out captions (default 504)")
    parser.add_argument("--noise-pictures", type=int, default=60, help="pictures a cell of the noise matrix; 0: none")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--guidance", type=float, default=Settings.guidance)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.steps, arguments.guidance)
    pipe = model.load(folder=arguments.weights)
    reader = judging.load_judge(pipe.device, folder=arguments.weights)
    scorer = model.load_scorer(folder=arguments.weights)

    def pictures(pool: Sequence[Scene], number: int) -> tuple[list[Scene], list[str], Tensor]:
        chosen = choose(pool, number)
        texts = [said.text for _, said in chosen]
        return [scene for scene, _ in chosen], texts, generate(pipe, text_states(pipe, texts), range(number), settings)

    arguments.out.mkdir(parents=True, exist_ok=True)
    scenes, texts, images = pictures(held_out_scenes(), arguments.pictures)
    contact_sheet(images[:48], texts[:48], arguments.out / "contact_sheet.png")
    known_scenes, _, known = pictures(training_scenes(), max(1, arguments.pictures // 2))
    found: dict[str, Any] = {
        "settings": {"steps": settings.steps, "guidance": settings.guidance},
        "held_out": attribute_table(reader, images, scenes),
        "held_out_pairs": pair_table(reader, images, scenes),
        "trained": attribute_table(reader, known, known_scenes),
        "judge": judging.accuracy(reader, judging.split()[1]),
        "autoencoder": autoencoder_table(pipe.vae, reader, min(1000, 2 * arguments.pictures)),
        "clip": clip_preference(scorer, min(1000, 2 * arguments.pictures)),
    }
    if arguments.noise_pictures:
        found["noise"] = noise_check.measure(pipe, reader, scorer, arguments.noise_pictures, settings)
    replace_text(arguments.out / "evaluation.json", json.dumps(found, indent=1) + "\n")
    print(report(found))
    print(f"contact sheet and evaluation.json in {arguments.out}")


if __name__ == "__main__":
    main()
