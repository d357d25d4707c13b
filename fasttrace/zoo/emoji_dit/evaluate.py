"""Measure the packaged transformer: ``python -m fasttrace.zoo.emoji_dit.evaluate [--out DIR]``.

The captions, the seeds and the judge are those of ``emoji``'s own evaluation, so that the two can be compared. What it
says of the judge, the autoencoder and the scorer holds here too: they are the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..emoji import noise_check
from ..emoji.data import NAMES, Scene, held_out_scenes, training_scenes
from ..emoji.drawing import Settings, choose, text_states
from ..emoji.evaluate import attribute_table, contact_sheet, pair_lines, pair_table, wilson
from ..emoji.judge import load_judge
from ..emoji.model import load_scorer
from ..emoji.training import replace_text
from . import model
from .train import latest

BARS = {"object": 0.80, "style": 0.80, "colour": 0.80, "count": 0.75, "background": 0.90, "pose": 0.70}
STEPS = 28


@torch.no_grad()
def draw_states(pipe: Any, states: Tensor, captions: Sequence[str], settings: Settings) -> Tensor:
    """Pictures [B, 3, 64, 64] in [0, 1] of text states [B, 24, 128] of the captions, seeds 0 upwards.

    The pooled state is the one of ``states`` where the caption ends, so that noise on a word reaches it too.
    """
    ends = torch.tensor([len(ids) - 1 for ids in pipe.tokenizer(list(captions), truncation=True)["input_ids"]])
    pooled = states[torch.arange(len(states)), ends]
    parts = []
    for start in tqdm(range(0, len(captions), settings.batch), desc="pictures", leave=False):
        rows = slice(start, start + settings.batch)
        parts.append(
            pipe(
                prompt_embeds=states[rows],
                pooled_prompt_embeds=pooled[rows],
                generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))[rows]],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(parts)


def report(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = ["| attribute | pictures, held out | 95% | aim | pictures, trained on |", "|---|---|---|---|---|"]
    for name in NAMES:
        held_out, trained = (right / total for right, total in (found["held_out"][name], found["trained"][name]))
        low, high = wilson(*found["held_out"][name])
        lines.append(f"| {name} | {held_out:.1%} | {low:.1%} to {high:.1%} | {BARS[name]:.0%} | {trained:.1%} |")
    lines += ["", *pair_lines(found["held_out_pairs"])]
    if "noise" in found:
        lines += noise_check.report(found["noise"])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emoji-dit-evaluation"))
    parser.add_argument("--weights", type=Path, default=model.WEIGHTS)
    parser.add_argument("--work", type=Path, help="measure the moving average in this work folder instead")
    parser.add_argument("--pictures", type=int, default=504, help="held-out captions (default 504)")
    parser.add_argument("--noise-pictures", type=int, default=60, help="pictures a cell of the noise matrix; 0: none")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=Settings.guidance)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.steps, arguments.guidance)
    pipe = model.assemble(latest(arguments.work)) if arguments.work else model.load(folder=arguments.weights)
    reader = load_judge(pipe.device)

    def pictures(pool: Sequence[Scene], number: int) -> tuple[list[Scene], list[str], Tensor]:
        chosen = choose(pool, number)
        texts = [said.text for _, said in chosen]
        return [scene for scene, _ in chosen], texts, draw_states(pipe, text_states(pipe, texts), texts, settings)

    arguments.out.mkdir(parents=True, exist_ok=True)
    scenes, texts, images = pictures(held_out_scenes(), arguments.pictures)
    contact_sheet(images[:48], texts[:48], arguments.out / "contact_sheet.png")
    known_scenes, _, known = pictures(training_scenes(), max(1, arguments.pictures // 2))
    found: dict[str, Any] = {
        "settings": {"steps": settings.steps, "guidance": settings.guidance},
        "held_out": attribute_table(reader, images, scenes),
        "held_out_pairs": pair_table(reader, images, scenes),
        "trained": attribute_table(reader, known, known_scenes),
    }
    if arguments.noise_pictures:
        found["noise"] = noise_check.measure(
            pipe, reader, load_scorer(pipe.device), arguments.noise_pictures, settings, draw=draw_states
        )
    replace_text(arguments.out / "evaluation.json", json.dumps(found, indent=1) + "\n")
    print(report(found))
    print(f"contact sheet and evaluation.json in {arguments.out}")


if __name__ == "__main__":
    main()
