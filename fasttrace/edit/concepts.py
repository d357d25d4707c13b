"""Concepts: which words are to mean what, in which sentences, and which of their tokens give keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import EditError
from ..prompts import Prompt, TokenizedPrompt

Positions: TypeAlias = Literal["subject_last", "subject_last_to_end", "aligned"]
POSITIONS = ("subject_last", "subject_last_to_end", "aligned")
Concepts: TypeAlias = Mapping[str, str] | Iterable[tuple[Prompt, Prompt]]

RELEASE_TEMPLATES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


@dataclass(frozen=True)
class Pair:
    """One sentence with the old subject, and the sentence that it should be read as."""

    old: Prompt
    new: Prompt


def pairs_of(concepts: Concepts, templates: Sequence[str]) -> list[Pair]:
    """Every concept in every template.

    Args:
        concepts: ``{old subject: new subject}``, put into each template; or pairs of `fasttrace.Prompt` taken as they
            are, whose subjects may stand anywhere.
        templates: sentences with one ``{}`` each.

    Raises:
        EditError: no concepts, a template without exactly one ``{}``, an old sentence with two meanings, or an old and
            a new sentence that are the same.
        PromptError: an empty subject.
    """
    if isinstance(concepts, Mapping):
        pairs = [
            Pair(in_template(old, template), in_template(new, template))
            for old, new in concepts.items()
            for template in templates
        ]
    else:
        pairs = [_as_pair(entry) for entry in concepts]
    if not pairs:
        raise EditError('no concepts: expected {"old subject": "new subject"} and at least one template')
    return checked(pairs)


def checked(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs without repetitions, if no old sentence is given two meanings."""
    meanings: dict[Place, Pair] = {}
    for pair in pairs:
        if pair.old.text == pair.new.text:
            raise EditError(f"the old and the new sentence are both {pair.old.text!r}: there is nothing to edit")
        first = meanings.setdefault(_place(pair.old), pair)
        if _place(first.new) != _place(pair.new):
            raise EditError(
                f"{pair.old.text!r} is to be read both as {first.new.text!r} and as {pair.new.text!r}: keep one of them"
            )
    return list(meanings.values())


def preserved(preserve: Iterable[str | Prompt], templates: Sequence[str]) -> list[Prompt]:
    """Sentences whose subjects keep their values; plain words are put into each template."""
    if isinstance(preserve, str):
        raise EditError(f"preserve={preserve!r}: expected a list of words or prompts")
    prompts = [
        prompt
        for entry in preserve
        for prompt in (
            [_unlabelled(entry)] if isinstance(entry, Prompt) else [in_template(entry, t) for t in templates]
        )
    ]
    return distinct(prompts)


Place = tuple[str, tuple[tuple[int, int], ...]]


def _place(prompt: Prompt) -> Place:
    """What decides a prompt's keys: the sentence, and where its subject stands in it."""
    return prompt.text, prompt.spans


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts without repetitions of a sentence with its subject at the same place."""
    found: dict[Place, Prompt] = {}
    for prompt in prompts:
        found.setdefault(_place(prompt), prompt)
    return list(found.values())


def check_compatible(pairs: Sequence[Pair], preserve: Sequence[Prompt]) -> None:
    """Raise an ``EditError`` where a subject is to be edited and to keep its values, which would halve the edit."""
    kept = {_place(prompt) for prompt in preserve}
    both = next((pair.old for pair in pairs if _place(pair.old) in kept), None)
    if both is not None:
        raise EditError(f"{both.subject!r} in {both.text!r} is both edited and preserved: leave it out of preserve")


def _unlabelled(prompt: Prompt) -> Prompt:
    """The prompt as far as an edit reads it, and as its recipe keeps it."""
    return Prompt(prompt.text, prompt.subject, span=prompt.span)


def in_template(subject: str, template: str) -> Prompt:
    """A prompt whose subject's place is known, wherever in the template it stands."""
    if not isinstance(subject, str):
        raise EditError(f"{subject!r} among the concepts or the words to preserve: expected words")
    parts = template.split("{}")
    if len(parts) != 2:
        raise EditError(f'template {template!r} has {len(parts) - 1} places "{{}}" for the subject: expected one')
    start = len(parts[0])
    return Prompt(parts[0] + subject + parts[1], subject, span=(start, start + len(subject)) if subject else None)


def _as_pair(entry: Any) -> Pair:
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not all(isinstance(p, Prompt) for p in entry):
        raise EditError(f"concepts contains {entry!r}: expected a pair of Prompts, or a mapping of words to words")
    return Pair(*map(_unlabelled, entry))


def aligned_positions(
    pair: Pair, old: TokenizedPrompt, new: TokenizedPrompt, rule: Positions
) -> tuple[list[int], list[int]]:
    """Token positions in the old sentence, and for each the position in the new sentence whose value it takes.

    ``"subject_last"`` is the last token of each occurrence of the subject. ``"subject_last_to_end"`` goes on from there
    to the end of the padding, aligned by offset. ``"aligned"`` adds what stands before: the sentence up to the subject,
    and the subject's tokens counted from its last, as many as both have.

    Raises:
        EditError: the spans do not align: different numbers of occurrences, or of tokens before or after the subject.
    """
    if rule not in POSITIONS:
        raise EditError(f"positions={rule!r}: expected one of {', '.join(POSITIONS)}")
    old_last, new_last = old.role("subject_last"), new.role("subject_last")
    if len(old_last) != len(new_last):
        raise _misaligned(pair, f"the subject occurs {len(old_last)} times in one and {len(new_last)} in the other")
    if rule == "subject_last":
        return list(old_last), list(new_last)
    if len(old_last) > 1:
        raise _misaligned(pair, f"the subject occurs {len(old_last)} times: give span= for one of them")
    i, j = old_last[0], new_last[0]
    if old.eos - i != new.eos - j:
        raise _misaligned(
            pair, f"{old.eos - i - 1} tokens follow the subject in one and {new.eos - j - 1} in the other"
        )
    tail = min(len(old.ids) - i, len(new.ids) - j)
    first, second = list(range(i, i + tail)), list(range(j, j + tail))
    if rule == "subject_last_to_end":
        return first, second
    before = old.subject[0]
    if before != new.subject[0]:
        raise _misaligned(pair, f"{before} tokens precede the subject in one and {new.subject[0]} in the other")
    inner = min(len(old.subject), len(new.subject)) - 1
    head = list(range(before))
    return [*head, *range(i - inner, i), *first], [*head, *range(j - inner, j), *second]


def _misaligned(pair: Pair, reason: str) -> EditError:
    return EditError(f"the spans of {pair.old.text!r} and {pair.new.text!r} do not align: {reason}")
