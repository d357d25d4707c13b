"""The noise check: noise on the words of one attribute, against what the judge then reads of each attribute.

The method rests on it: at the right scale a noised attribute falls near chance while the others mostly stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...corruption import GaussianNoise
from ...engine.text.trace import trace_text
from ...findings.statistics import mean_interval
from ...metrics.scorers import Scorer, clip_scores
from ...prompts import Prompt
from . import judge as judging
from .data import NAMES, NO_COLOUR, SIZES, Caption, held_out_scenes
from .drawing import Settings, choose, generate, labels_of, text_states

SCALES = (1, 3, 10, 30)
Draw = Callable[[Any, Tensor, Sequence[str], Settings], Tensor]


def draw_states(pipe: Any, states: Tensor, captions: Sequence[str], settings: Settings) -> Tensor:
    """Pictures of text states, seeds 0 upwards, by a pipeline that reads nothing but them."""
    return generate(pipe, states, range(len(captions)), settings)


def measure(
    pipe: Any,
    reader: judging.Judge,
    scorer: Scorer,
    number: int,
    settings: Settings,
    scales: Sequence[float] = SCALES,
    draw: Draw = draw_states,
) -> dict[str, dict[str, Any]]:
    """What noise at each scale does to ``number`` pictures of held-out captions, the seeds the same throughout.

    Every scene has a colour, so that there is a word to noise. ``draw`` makes pictures of text states of captions.

    Returns:
        For each scale (``"3x"``) ``read``: noised attribute to the share of pictures in which each attribute is read
        as the caption says, with the rows ``none`` (no noise) and ``chance``; and for ``judge``, the probability that
        the judge gives the caption's value of the noised attribute, and ``clip_score``: noised attribute to its total
        effect, clean minus corrupted, as mean and 95% interval over captions.
    """
    pool = [scene for scene in held_out_scenes() if scene.values["colour"] != NO_COLOUR]
    chosen = choose(pool, number, seed=1)
    captions = [said.text for _, said in chosen]
    target = labels_of([scene for scene, _ in chosen])

    def look(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read as the caption says [N, 6]; the judge's probability of that [N, 6]; CLIP score [N]."""
        images = draw(pipe, states, captions, settings)
        sure = reader.probabilities(images)
        sure_of = torch.stack([sure[name].gather(1, target[:, i, None])[:, 0] for i, name in enumerate(NAMES)], dim=1)
        return reader.labels(images) == target, sure_of, clip_scores(scorer, images, captions)

    clean = look(text_states(pipe, captions))
    found: dict[str, dict[str, Any]] = {}
    for scale in scales:
        read = {"none": _shares(clean[0]), "chance": [1 / size for size in SIZES]}
        effects: dict[str, dict[str, list[float]]] = {"judge": {}, "clip_score": {}}
        for i, name in enumerate(NAMES):
            noised = look(_corrupted_states(pipe, [said for _, said in chosen], name, scale))
            read[name] = _shares(noised[0])
            effects["judge"][name] = _mean(clean[1][:, i] - noised[1][:, i])
            effects["clip_score"][name] = _mean(clean[2] - noised[2])
        found[f"{scale:g}x"] = {"read": read, **effects}
    return found


@torch.no_grad()
def _corrupted_states(pipe: Any, captions: Sequence[Caption], attribute: str, scale: float) -> Tensor:
    """Text states [N, T, D] with noise on the attribute's words, another draw for each caption."""
    table = pipe.text_encoder.get_input_embeddings().weight
    prompts = [
        Prompt(said.text, said.words[attribute], attribute=attribute).tokenize(pipe.tokenizer) for said in captions
    ]
    noise = GaussianNoise(f"{scale:g}x")
    sigma = noise.resolve(table, [prompt.ids[i] for prompt in prompts for i in prompt.subject])
    states = []
    for k, prompt in enumerate(prompts):
        drawn = noise.draw(sigma, k, len(prompt.ids), prompt.subject, table.shape[1])
        states.append(trace_text(pipe.text_encoder, prompt.ids, [], drawn, engine="oracle").corrupted)
    return torch.stack(states)


def _shares(right: Tensor) -> list[float]:
    shares: list[float] = right.float().mean(0).tolist()
    return shares


def _mean(values: Tensor) -> list[float]:
    numbers = values.double().numpy()
    low, high = mean_interval(numbers)
    return [float(numbers.mean()), float(low), float(high)]


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    """The tables in Markdown, one line each."""
    lines = []
    for scale, parts in found.items():
        lines += ["", f"| noise {scale} on | " + " | ".join(f"{name} read" for name in NAMES) + " |"]
        lines.append("|---|" + "---|" * len(NAMES))
        lines += [
            f"| {row} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
            for row, shares in parts["read"].items()
        ]
    lines += ["", "| total effect | noise | " + " | ".join(NAMES) + " |", "|---|---|" + "---|" * len(NAMES)]
    for kind in ("judge", "clip_score"):
        for scale, parts in found.items():
            cells = [
                f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in (parts[kind][name] for name in NAMES)
            ]
            lines.append(f"| {kind} | {scale} | " + " | ".join(cells) + " |")
    return lines
