"""Prompts, and where their subjects stand among the tokens."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import PromptError


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is traced in it.

    Args:
        text: the caption.
        subject: the words that are corrupted, as they stand in ``text``; case and surrounding punctuation do not
            matter. Every occurrence is taken unless ``span`` names one.
        attribute: what the subject expresses, such as ``"object"``, ``"style"``, ``"color"``; a label for grouping.
        span: characters ``(start, stop)`` of the subject in ``text``, for one occurrence or an odd boundary.
        target: a caption to edit towards or to interchange with, if the study needs one.
        id: name in tables; the text itself if empty.
        seeds: seeds of this prompt's latents, if they differ from the study's.

    Raises:
        PromptError: a text or subject that is empty or no text, an id or target that is no text, half a character, a
            span or seeds that are no whole numbers, or a subject that does not stand in the text as whole words.
    """

    text: str
    subject: str
    attribute: str = "object"
    span: tuple[int, int] | None = None
    target: str | None = None
    id: str = ""
    seeds: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("text", "subject"):
            if not isinstance(getattr(self, name), str):
                raise PromptError(f"{name}={getattr(self, name)!r}: expected text")
        if not isinstance(self.id, str):
            raise PromptError(f"id={self.id!r}: expected text")
        if self.target is not None and not isinstance(self.target, str):
            raise PromptError(f"target={self.target!r}: expected text")
        for name in ("text", "subject", "target", "id"):
            if any("\ud800" <= letter <= "\udfff" for letter in getattr(self, name) or ""):
                raise PromptError(f"{name}={getattr(self, name)!r} has half a character (a lone surrogate): remove it")
        if not self.text.strip():
            raise PromptError("prompt text is empty: expected a caption")
        if not self.subject.strip():
            raise PromptError(f"prompt {self.text!r} has an empty subject: name the words to corrupt")
        if self.span is not None:
            start, stop = _whole_numbers("span", self.span, 2)
            if not 0 <= start < stop <= len(self.text):
                raise PromptError(f"span {self.span} is not within the {len(self.text)} characters of {self.text!r}")
            spans: tuple[tuple[int, int], ...] = ((start, stop),)
        else:
            spans = _occurrences(self.text, self.subject)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "id", self.id or self.text)
        if self.seeds is not None:
            object.__setattr__(self, "seeds", _whole_numbers("seeds", self.seeds))

    def tokenize(self, tokenizer: Any) -> TokenizedPrompt:
        """Token ids, and the positions of the subject.

        Args:
            tokenizer: a tokenizer of transformers, as the pipeline carries it.

        Raises:
            PromptError: the subject is cut off, wholly or in part, by the tokenizer's limit.
        """
        limit = tokenizer.model_max_length
        encoded = tokenizer(self.text, padding="max_length", truncation=True, max_length=limit)
        ids = tuple(int(i) for i in encoded["input_ids"])
        owners = _token_spans(self.text, tokenizer)
        bos = 1 if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else 0
        eos = ids.index(tokenizer.eos_token_id, 1) if tokenizer.eos_token_id in ids[1:] else len(ids) - 1
        found = [[i + bos for i, (a, b) in enumerate(owners) if a < stop and start < b] for start, stop in self.spans]
        occurrences = tuple(tuple(tokens) for tokens in found if tokens)
        if not occurrences:
            raise PromptError(f"the subject {self.subject!r} of {self.text!r} has no token of its own")
        last = occurrences[-1][-1]
        if last >= eos:
            raise PromptError(
                f"the subject {self.subject!r} of {self.text!r} is cut off: its last token would stand at position "
                f"{last}, and the tokenizer keeps {limit} tokens; shorten the prompt"
            )
        words = tokenizer.convert_ids_to_tokens(list(ids))
        return TokenizedPrompt(ids, occurrences, eos, tuple(str(word).replace("</w>", "") for word in words))


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as one text encoder reads it.

    Attributes:
        ids: token ids, padded to the tokenizer's limit.
        occurrences: positions of the subject's tokens, ascending, for each place where it stands.
        eos: position of the first end-of-text token.
        tokens: each position's text, for labels.
    """

    ids: tuple[int, ...]
    occurrences: tuple[tuple[int, ...], ...]
    eos: int
    tokens: tuple[str, ...]

    @property
    def subject(self) -> tuple[int, ...]:
        """Positions of all the subject's tokens, ascending."""
        return tuple(sorted({position for tokens in self.occurrences for position in tokens}))

    def role(self, name: str) -> tuple[int, ...]:
        """Positions of a token role: ``subject``, ``subject_first``, ``subject_last``, ``eos`` or ``pad``.

        ``subject_first`` and ``subject_last`` are one token for each occurrence of the subject.
        """
        if name == "subject":
            return self.subject
        if name == "eos":
            return (self.eos,)
        if name == "pad":
            return tuple(range(self.eos + 1, len(self.ids)))
        if name == "subject_first":
            return tuple(tokens[0] for tokens in self.occurrences)
        if name == "subject_last":
            return tuple(tokens[-1] for tokens in self.occurrences)
        raise PromptError(f"token role {name!r}: expected subject, subject_first, subject_last, eos or pad")

    def role_of(self, position: int) -> str:
        """The most telling role of one position: also ``bos``, ``before`` and ``after`` the subject."""
        for name in ("subject_last", "subject_first", "subject", "eos", "pad"):
            if position in self.role(name):
                return name
        if position == 0:
            return "bos"
        return "before" if position < self.subject[0] else "after"


def _token_spans(text: str, tokenizer: Any) -> Sequence[tuple[int, int]]:
    """Characters of ``text`` that each token stands for, without special tokens and without truncation."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    return _spans_by_matching(text, tokenizer)


def _spans_by_matching(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Offsets from a tokenizer that reports none: its tokens, put end to end, spell the text without its spaces."""
    lowered = text.lower()
    spans, cursor = [], 0
    for token in tokenizer.tokenize(text):
        piece = tokenizer.convert_tokens_to_string([token]).replace("</w>", "").strip().lower()
        start = lowered.find(piece, cursor)
        if not piece or start < 0:
            raise PromptError(f"cannot align token {token!r} with {text!r}: use a fast tokenizer (is_fast)")
        cursor = start + len(piece)
        spans.append((start, cursor))
    return spans


def _whole_numbers(name: str, given: Any, count: int | None = None) -> tuple[int, ...]:
    try:
        numbers = tuple(operator.index(value) for value in given)
    except TypeError:
        numbers = ()
    if not numbers or (count is not None and len(numbers) != count):
        raise PromptError(f"{name}={given!r}: expected {'' if count is None else f'{count} '}whole numbers")
    return numbers


def _occurrences(text: str, subject: str) -> tuple[tuple[int, int], ...]:
    words = r"\s+".join(re.escape(word) for word in subject.split())
    pattern = rf"(?<!\w){words}(?!\w)"
    found = tuple(match.span() for match in re.finditer(pattern, text, flags=re.IGNORECASE))
    if not found:
        raise PromptError(
            f"the subject {subject!r} does not stand in {text!r} as whole words: correct it, or give span=(start, stop)"
        )
    return found
