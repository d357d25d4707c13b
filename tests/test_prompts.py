"""Subject positions through a BPE tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fasttrace as ft
from fasttrace.errors import PromptError
from fasttrace.prompts import _spans_by_matching, _token_spans


@pytest.fixture
def tokenizer(tiny_sd15: Any) -> Any:
    return tiny_sd15.tokenizer


def subject_text(prompt: ft.Prompt, tokenizer: Any) -> str:
    """What the subject's positions spell, by the tokenizer's own account."""
    tokenized = prompt.tokenize(tokenizer)
    return tokenizer.decode([tokenized.ids[p] for p in tokenized.subject]).replace(" ", "")


@pytest.mark.parametrize(
    ("text", "subject", "occurrences"),
    [
        ("a red apple on a table", "apple", 1),
        ("an Apple, and an apple.", "apple", 2),
        ("A painting by VAN GOGH!", "van gogh", 1),
        ("a portrait in Rembrandt's style", "Rembrandt", 1),
        ("a photo of   van  gogh at night", "van gogh", 1),
        ("xylophonist playing", "xylophonist", 1),
        ("a pineapple beside an apple", "apple", 1),
        ("a very very red apple", "very", 2),
        ("van gogh, van gogh van gogh", "van gogh", 3),
    ],
)
def test_positions_spell_the_subject(tokenizer: Any, text: str, subject: str, occurrences: int) -> None:
    prompt = ft.Prompt(text, subject)
    assert subject_text(prompt, tokenizer) == subject.lower().replace(" ", "") * occurrences
    assert len(prompt.tokenize(tokenizer).role("subject_last")) == occurrences
    assert len(prompt.tokenize(tokenizer).role("subject_first")) == occurrences


def test_roles_partition_the_positions_after_the_subject(tokenizer: Any) -> None:
    tokenized = ft.Prompt("a photo of rembrandt today", "rembrandt").tokenize(tokenizer)
    assert len(tokenized.subject) > 1, "the subject must split, or this test shows nothing"
    assert tokenized.ids[tokenized.eos] == tokenizer.eos_token_id
    assert tokenized.role("pad") == tuple(range(tokenized.eos + 1, len(tokenized.ids)))
    roles = [tokenized.role_of(p) for p in range(len(tokenized.ids))]
    first, last = tokenized.subject[0], tokenized.subject[-1]
    assert roles[0] == "bos"
    assert set(roles[1:first]) == {"before"}
    assert roles[first] == "subject_first"
    assert roles[last] == "subject_last"
    assert set(roles[last + 1 : tokenized.eos]) == {"after"}
    assert roles[tokenized.eos] == "eos"
    assert set(roles[tokenized.eos + 1 :]) == {"pad"}


def test_a_span_picks_one_occurrence(tokenizer: Any) -> None:
    text = "an apple and an apple"
    both = ft.Prompt(text, "apple").tokenize(tokenizer).subject
    second = ft.Prompt(text, "apple", span=(16, 21)).tokenize(tokenizer).subject
    assert second == both[len(both) // 2 :]


def test_an_absent_subject_is_refused() -> None:
    with pytest.raises(PromptError, match="'pear' does not stand in"):
        ft.Prompt("a red apple", "pear")
    with pytest.raises(PromptError, match="whole words"):
        ft.Prompt("two cats", "cat")


@pytest.mark.parametrize("filler", [74, 80, 200])
def test_a_subject_cut_off_by_the_limit_is_refused(tokenizer: Any, filler: int) -> None:
    with pytest.raises(PromptError, match="cut off"):
        ft.Prompt("a " * filler + "rembrandt", "rembrandt").tokenize(tokenizer)


def test_a_subject_that_just_fits_is_taken(tokenizer: Any) -> None:
    tokenized = ft.Prompt("a " * 74 + "apple", "apple").tokenize(tokenizer)
    assert tokenized.subject == (75,)
    assert tokenized.eos == 76


@pytest.mark.parametrize(
    ("text", "subject", "span"),
    [("", "x", None), ("a", " ", None), ("a cat", "cat", (2, 9)), (None, "cat", None), ("a cat", ["cat"], None)],
)
def test_malformed_prompts_are_refused(text: Any, subject: Any, span: tuple[int, int] | None) -> None:
    with pytest.raises(PromptError):
        ft.Prompt(text, subject, span=span)


def test_seeds_and_spans_are_whole_numbers_of_python() -> None:
    prompt = ft.Prompt("a red apple", "apple", span=(6, 11), seeds=np.array([3, 4]))
    assert prompt.seeds == (3, 4)
    assert all(type(seed) is int for seed in prompt.seeds)
    for given in ({"seeds": 3}, {"seeds": [0.5]}, {"seeds": []}, {"span": (1,)}, {"span": 4}, {"span": (0.0, 2.0)}):
        with pytest.raises(PromptError, match=r"(seeds|span)=.*: expected (2 )?whole numbers"):
            ft.Prompt("a red apple", "apple", **given)


def test_offsets_found_by_matching_equal_the_tokenizers_own(tokenizer: Any) -> None:
    text = "A portrait of Rembrandt, in VAN GOGH's style!"
    assert _spans_by_matching(text, tokenizer) == list(_token_spans(text, tokenizer))
