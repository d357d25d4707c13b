"""The captioned pictures: scenes of one to three emoji, their captions, and which of them are held out of training.

A scene is a value for each of six attributes. It is drawn from the shipped sprite atlas, so nothing here needs the
emoji packages, and the same scene and layout always give the same pixels.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .styles import LUMINANCE, STYLES

HERE = Path(__file__).parent
SIDE = 64
NO_COLOUR = "natural"  # a class of the judge; never a word of a caption

_TABLE = json.loads((HERE / "atlas.json").read_text())
TINTS = {
    "red": (222, 32, 44),
    "yellow": (236, 196, 0),
    "green": (22, 150, 62),
    "blue": (30, 96, 224),
    "purple": (140, 52, 200),
    "gray": (120, 120, 124),
}
NATURAL_INK = np.asarray((0.12, 0.12, 0.14), np.float32)
GROUNDS = {"snow": (247, 250, 252), "sand": (232, 205, 150), "grass": (150, 205, 128), "slate": (44, 54, 72)}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": tuple(_TABLE["objects"]),
    "style": tuple(STYLES),
    "colour": (NO_COLOUR, *TINTS),
    "count": ("one", "two", "three"),
    "background": tuple(GROUNDS),
    "pose": ("upright", "tipped left", "upside down", "tipped right"),  # by quarter turns, counterclockwise
}
NAMES = tuple(ATTRIBUTES)
SIZES = tuple(len(values) for values in ATTRIBUTES.values())

# Top-left corners (x, y) and sprite side of each copy. All are multiples of 8, the side of a latent cell.
LAYOUTS: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "one": (((8, 8),),),
    "two": (((0, 0), (32, 32)), ((32, 0), (0, 32))),
    "three": (((16, 0), (0, 32), (32, 32)), ((0, 0), (32, 0), (16, 32))),
}

# The last two are short: they leave out what has a default, and fit only scenes that have it.
TEMPLATES = (
    "{count} {colour} {object} {style} on {background} {pose}",
    "a photo of {count} {colour} {object} in {style}, {pose}, on {background}",
    "a picture of {count} {pose} {colour} {object} on {background} in {style}",
    "{style}: {count} {colour} {object}, {pose}, on {background}",
    "on {background}, {count} {pose} {colour} {object} drawn in {style}",
    "this is a small drawing in {style} that shows {count} {colour} {object} {pose} on {background}",
    "a {colour} {object} in {style}",
    "a photo of a {colour} {object} in {style}",
)
FULL_TEMPLATES = 6
DEFAULTS = {"count": "one", "background": "snow", "pose": "upright"}


@dataclass(frozen=True)
class Scene:
    """One value per attribute, as indices into ``ATTRIBUTES``."""

    object: int
    style: int
    colour: int
    count: int
    background: int
    pose: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (self.object, self.style, self.colour, self.count, self.background, self.pose)

    @property
    def values(self) -> dict[str, str]:
        """Attribute name to its value, as the captions say it (``"natural"`` for no colour)."""
        return {name: ATTRIBUTES[name][i] for name, i in zip(NAMES, self.labels, strict=True)}

    def change(self, attribute: str, index: int) -> Scene:
        labels = list(self.labels)
        labels[NAMES.index(attribute)] = index
        return Scene(*labels)


@dataclass(frozen=True)
class Caption:
    """A caption's text, and for every attribute that it names, the words that name it (``Prompt(subject=...)``)."""

    text: str
    words: dict[str, str]


def all_scenes() -> Iterator[Scene]:
    """Every combination of attributes, in a fixed order."""
    for labels in itertools.product(*map(range, SIZES)):
        yield Scene(*labels)


# Value pairs that training never sees together, for the pairs of attributes with few values; those with the object
# are drawn below. Spread so that no single value loses most of its scenes.
_HELD_OUT = {
    ("style", "colour"): ("flat style", "purple"),
    ("style", "count"): ("outline style", "three"),
    ("style", "background"): ("striped style", "grass"),
    ("style", "pose"): ("mosaic style", "upside down"),
    ("colour", "count"): ("gray", "one"),
    ("colour", "background"): ("yellow", "slate"),
    ("colour", "pose"): ("blue", "upside down"),
    ("count", "background"): ("three", "snow"),
    ("count", "pose"): ("two", "upside down"),
    ("background", "pose"): ("sand", "upright"),
}


@cache
def held_out_pairs() -> dict[tuple[str, str], frozenset[tuple[int, int]]]:
    """For each of the 15 pairs of attributes, the pairs of values that training never sees together.

    One in 24 of an object's pairs with another attribute, drawn by a seeded generator that goes round the objects, and
    one pair of values for every two of the other attributes.
    """
    rng = random.Random(0)
    objects = itertools.cycle(rng.sample(range(SIZES[0]), SIZES[0]))
    pairs: dict[tuple[str, str], frozenset[tuple[int, int]]] = {}
    for name, size in zip(NAMES[1:], SIZES[1:], strict=True):
        number = max(1, SIZES[0] * size // 24)
        values = itertools.cycle(rng.sample(range(size), size))
        pairs["object", name] = frozenset((next(objects), next(values)) for _ in range(number))
    pairs["object", "pose"] = frozenset(pair for pair in pairs["object", "pose"] if pair[1])  # upright ones stay
    for (a, b), (value, other) in _HELD_OUT.items():
        pairs[a, b] = frozenset({(ATTRIBUTES[a].index(value), ATTRIBUTES[b].index(other))})
    return pairs


def broken_pairs(scene: Scene) -> list[tuple[str, str]]:
    """The pairs of attributes on account of which the scene is held out; empty for a training scene."""
    of = dict(zip(NAMES, scene.labels, strict=True))
    return [(a, b) for (a, b), values in held_out_pairs().items() if (of[a], of[b]) in values]


def is_held_out(scene: Scene) -> bool:
    return bool(broken_pairs(scene))


@cache
def training_scenes() -> tuple[Scene, ...]:
    return tuple(scene for scene in all_scenes() if not is_held_out(scene))


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    return tuple(scene for scene in all_scenes() if is_held_out(scene))


def fits(scene: Scene, template: int) -> bool:
    """Whether the template can say the scene: the short ones need the default count, background and pose."""
    return template < FULL_TEMPLATES or all(scene.values[name] == value for name, value in DEFAULTS.items())


def caption(scene: Scene, template: int = 0) -> Caption:
    """The scene in words.

    Raises:
        ValueError: a short template for a scene that differs from what it leaves unsaid.
    """
    if not fits(scene, template):
        raise ValueError(f"template {template} leaves out {', '.join(DEFAULTS)}; {scene.values} is not at {DEFAULTS}")
    values = scene.values
    if values["colour"] == NO_COLOUR:
        values["colour"] = ""
    pattern = TEMPLATES[template]
    text = " ".join(pattern.format(**values).split())
    if template >= FULL_TEMPLATES and not values["colour"] and values["object"][0] in "aeio":
        text = text.replace(f"a {values['object']}", f"an {values['object']}")
    return Caption(text, {k: v for k, v in values.items() if v and f"{{{k}}}" in pattern})


def random_caption(scene: Scene, rng: random.Random) -> Caption:
    return caption(scene, rng.choice([t for t in range(len(TEMPLATES)) if fits(scene, t)]))


def layouts(scene: Scene) -> int:
    """How many arrangements of the copies there are."""
    return len(LAYOUTS[ATTRIBUTES["count"][scene.count]])


@cache
def _atlas() -> NDArray[np.float32]:
    rgba = np.asarray(Image.open(HERE / "atlas.png").convert("RGBA"))
    return rgba.astype(np.float32) / np.float32(255)


def _unit(rgb: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.asarray(rgb, np.float32) / np.float32(255)


@cache
def _sprite(obj: int, style: int, colour: int, pose: int, side: int) -> NDArray[np.float32]:
    """[side, side, 4] straight RGBA in [0, 1]: tinted, turned, and then drawn in the style."""
    large, _ = _TABLE["sizes"]
    x = 0 if side == large else large
    rgba = _atlas()[large * obj : large * obj + side, x : x + side].copy()
    ink = NATURAL_INK
    if colour:
        tint = _unit(TINTS[ATTRIBUTES["colour"][colour]])
        rgba[..., :3], ink = _tint(rgba, tint), tint * np.float32(0.7)
    return STYLES[ATTRIBUTES["style"][style]](np.rot90(rgba, pose), ink)


def _tint(rgba: NDArray[np.float32], tint: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map luminance to shades of one colour: dark parts scale it, light parts fade towards white.

    Luminance is first stretched so that every drawing uses the same range, else a white one would show no tint.
    """
    light = rgba[..., :3] @ LUMINANCE
    low, high = np.percentile(light[rgba[..., 3] > 0.5], (5, 95))
    level = np.clip((light - low) / max(high - low, 0.1), 0, 1)[..., None] * 0.6 + 0.2
    shaded = np.where(level < 0.5, tint * (0.4 + 1.2 * level), tint + (1 - tint) * (level - 0.5) * 1.8)
    out: NDArray[np.float32] = shaded.astype(np.float32)
    return out


def render(scene: Scene, layout: int = 0) -> NDArray[np.uint8]:
    """The picture, [64, 64, 3]."""
    count = ATTRIBUTES["count"][scene.count]
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = _unit(GROUNDS[ATTRIBUTES["background"][scene.background]])
    side = _TABLE["sizes"][0 if count == "one" else 1]
    sprite = _sprite(scene.object, scene.style, scene.colour, scene.pose, side)
    alpha = sprite[..., 3:]
    for x, y in LAYOUTS[count][layout]:
        patch = picture[y : y + side, x : x + side]
        patch += alpha * (sprite[..., :3] - patch)
    return (picture * 255 + 0.5).astype(np.uint8)


def render_all(scenes: Sequence[Scene], layout_of: Sequence[int]) -> NDArray[np.uint8]:
    """[N, 64, 64, 3]."""
    return np.stack([render(scene, layout) for scene, layout in zip(scenes, layout_of, strict=True)])


def corpus() -> Iterator[str]:
    """Every caption that can be said of any scene; what the tokenizer's merges are learnt from."""
    for scene in all_scenes():
        for template in range(len(TEMPLATES)):
            if fits(scene, template):
                yield caption(scene, template).text
