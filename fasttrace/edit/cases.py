"""Prompts to judge an edit by: drawn from the packaged model's captions, or made of words for any other model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..errors import EditError
from .concepts import in_template
from .judge import Case

_TARGETS = ("{}", "a photo of {}")
_PARAPHRASES = ("a picture of {}", "an image that shows {}")
_NEIGHBOURS = ("a photo of {}",)
_UNRELATED = ("a red apple on a table", "a dog in a garden", "a mountain at night", "a street in the rain")


def worded_cases(
    old: str, new: str, neighbours: Sequence[str] = (), unrelated: Sequence[str] = _UNRELATED
) -> list[Case]:
    """Cases made of words.

    Args:
        old: the subject that was edited.
        new: what it should be read as.
        neighbours: related subjects.
        unrelated: whole prompts.
    """
    made = [
        Case(in_template(old, template).text, about, in_template(new, template).text)
        for about, templates in (("target", _TARGETS), ("paraphrase", _PARAPHRASES))
        for template in templates
    ]
    made += [Case(in_template(word, template).text, "neighbour") for word in neighbours for template in _NEIGHBOURS]
    return made + [Case(text, "unrelated") for text in unrelated]


def emoji_attribute(old: str, new: str) -> str:
    """The attribute of the packaged model's captions that both words are values of.

    Raises:
        EditError: there is none; names the values.
    """
    from ..zoo.emoji.data import ATTRIBUTES

    for name, values in ATTRIBUTES.items():
        if old in values and new in values:
            return name
    listed = "; ".join(f"{name}: {', '.join(values)}" for name, values in ATTRIBUTES.items())
    raise EditError(f"{old!r} and {new!r} are not values of one attribute of the packaged model ({listed})")


def emoji_captions(number: int = 600, seed: int = 0) -> list[str]:
    """Captions of the packaged model's training scenes, for ``fit_edit(captions=...)``.

    Args:
        number: how many.
        seed: of the draw.
    """
    from ..zoo.emoji.data import random_caption, training_scenes

    rng = random.Random(seed)
    return [random_caption(scene, rng).text for scene in rng.sample(training_scenes(), number)]


def emoji_cases(old: str, new: str, number: int = 8, seed: int = 0) -> list[Case]:
    """Cases drawn from the packaged model's captions.

    Targets and paraphrases are scenes that have the old value, said in the first two and in the other full templates;
    neighbours are the same scenes with another value of the attribute; unrelated are scenes without the old value.

    Args:
        old: a value of an attribute, as captions say it.
        new: another value of the same attribute.
        number: how many prompts of each kind.
        seed: of the draw.
    """
    from ..zoo.emoji.data import ATTRIBUTES, FULL_TEMPLATES, NO_COLOUR, all_scenes, caption

    attribute = emoji_attribute(old, new)
    values = ATTRIBUTES[attribute]
    new_index = values.index(new)
    others = [i for i, value in enumerate(values) if value not in (old, new, NO_COLOUR)] or [new_index]
    rng = random.Random(seed)
    having = [scene for scene in all_scenes() if scene.values[attribute] == old]
    without = [scene for scene in all_scenes() if scene.values[attribute] != old]
    cases = []
    for about, templates in (("target", range(2)), ("paraphrase", range(2, FULL_TEMPLATES))):
        for scene in rng.sample(having, number):
            template = rng.choice(templates)
            wanted = caption(scene.change(attribute, new_index), template).text
            cases.append(Case(caption(scene, template).text, about, wanted))
    near = [scene.change(attribute, rng.choice(others)) for scene in rng.sample(having, number)]
    for about, scenes in (("neighbour", near), ("unrelated", rng.sample(without, number))):
        cases += [Case(caption(scene, rng.randrange(FULL_TEMPLATES)).text, about) for scene in scenes]
    return cases
