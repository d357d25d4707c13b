"""Prompt files: the packaged sets, every wrong field with its line, and screening with counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

import fasttrace as ft
from fasttrace.errors import StudyError
from fasttrace.study.promptsets import load_prompts, parse_prompts, prompt_sets, write_prompts
from fasttrace.study.screening import screen_table, screening

GOOD = {"id": "one", "attribute": "object", "prompt": "a red apple", "subject": "apple"}
SETS = {
    "objects": "object", "style": "style", "color": "color", "action": "action", "viewpoint": "viewpoint",
    "count": "count",
}  # fmt: skip


def test_the_packaged_sets_are_there_by_name() -> None:
    assert {"emoji", *SETS} <= set(prompt_sets())


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_set_has_twenty_prompts_of_its_attribute_each_with_another_target(name: str) -> None:
    prompts = load_prompts(name)
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 20
    assert {prompt.attribute for prompt in prompts} == {SETS[name]}
    for prompt in prompts:
        assert len(prompt.spans) == 1
        assert prompt.target is not None
        assert prompt.target != prompt.text
        assert not re.search(rf"(?<!\w){re.escape(prompt.subject)}(?!\w)", prompt.target, flags=re.IGNORECASE)


def test_the_emoji_set_stays_within_the_model_s_captions() -> None:
    from fasttrace.zoo.emoji import data

    prompts = load_prompts("emoji")
    for attribute in data.NAMES:
        own = [prompt for prompt in prompts if prompt.attribute == attribute]
        assert len(own) >= 20
        assert {prompt.subject for prompt in own} <= set(data.ATTRIBUTES[attribute])
        assert len({prompt.subject for prompt in own}) == len(set(data.ATTRIBUTES[attribute]) - {data.NO_COLOUR})
    words = {word for template in data.TEMPLATES for word in re.findall(r"[a-z]+(?![a-z}])", template)}
    words |= {word for values in data.ATTRIBUTES.values() for value in values for word in value.split()}
    for prompt in prompts:
        assert set(re.findall(r"\w+", f"{prompt.text} {prompt.target}")) <= words


def test_id_and_attribute_may_be_left_out_and_fields_named_as_in_prompt(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    lines = [{"text": "a red\u2028apple", "subject": "apple", "target": "a\x85pear"}, GOOD]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines), newline="")
    first, second = load_prompts(path)
    assert first == ft.Prompt("a red\u2028apple", "apple", target="a\x85pear")
    assert (first.id, first.attribute) == ("a red\u2028apple", "object")
    assert second == ft.Prompt("a red apple", "apple", id="one")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: expected an object"),
        (json.dumps({**GOOD, "sujbect": "x"}), r"line 2: unknown field 'sujbect'; expected id, attribute"),
        (json.dumps({**GOOD, "text": "x"}), r"line 2: fields 'prompt' and 'text' are two names"),
        (json.dumps({name: GOOD[name] for name in ("id", "attribute", "prompt")}), r"line 2: no field 'subject'"),
        (json.dumps({**GOOD, "id": 3}), r"line 2: field 'id' is 3: expected text"),
        (json.dumps({**GOOD, "prompt": " "}), r"line 2: field 'prompt' is ' '"),
        (json.dumps({**GOOD, "target_prompt": ["x"]}), r"line 2: field 'target_prompt'"),
        (json.dumps({**GOOD, "seeds": [1, 1]}), r"line 2: field 'seeds' is \[1, 1\]"),
        (json.dumps({**GOOD, "seeds": 4}), r"line 2: field 'seeds' is 4"),
        (json.dumps({**GOOD, "seeds": [True]}), r"line 2: field 'seeds'"),
        (json.dumps({**GOOD, "span": [1]}), r"line 2: field 'span' is \[1\]"),
        (json.dumps({**GOOD, "span": [3, 99]}), r"line 2: span \(3, 99\)"),
        (json.dumps({**GOOD, "subject": "pear"}), r"line 2: the subject 'pear' does not stand in"),
        (json.dumps({**GOOD, "id": "zero"}), r"line 2: id 'zero' is that of line 1 too"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "zero"}) + "\n" + line + "\n")
    with pytest.raises(StudyError, match=rf"set\.jsonl, {message}"):
        load_prompts(path)


def test_files_that_are_not_there_or_empty_or_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no prompt file 'objekts'.*packaged sets are .*objects"):
        load_prompts("objekts")
    with pytest.raises(StudyError, match="x has no prompts"):
        parse_prompts(["", " "], "x")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyError, match="not UTF-8"):
        load_prompts(tmp_path / "binary")


def test_written_prompts_come_back(tmp_path: Path) -> None:
    prompts = (
        ft.Prompt("a red apple and an apple", "apple", span=(19, 24), id="x", seeds=(3, 4), target="a red pear"),
        ft.Prompt("naïve café", "café", attribute="style"),
    )
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert load_prompts(tmp_path / "p.jsonl") == prompts


SCORES = [("a", 0, 30.0, 10.0), ("a", 1, 12.0, 10.0), ("b", 0, 30.0, 25.0), ("b", 0, 30.0, 29.0), ("b", 1, 9.0, 40.0)]


def test_screening_drops_by_its_thresholds_and_counts_each_pair_once() -> None:
    found = screening("clip_score", SCORES, min_clean=20, max_corrupted=26)
    assert [(pair.prompt_id, pair.seed) for pair in found.kept] == [("a", 0)]
    assert [(pair.prompt_id, pair.seed) for pair in found.low_clean] == [("a", 1), ("b", 1)]
    assert [(pair.prompt_id, pair.seed, pair.corrupted) for pair in found.high_corrupted] == [("b", 0, 27.0)]
    assert found.summary().splitlines() == [
        "1 of 4 (prompt, seed) pairs kept, by clip_score",
        "2 dropped: clean score below 20",
        "1 dropped: corrupted score above 26",
    ]
    assert found.record()["kept"] == 1
    assert len(screening("clip_score", SCORES).kept) == 4


def test_a_table_is_screened_by_its_baselines() -> None:
    rows = [
        {"prompt_id": one, "seed": seed, "noise_sample": sample, "metric": "m", "clean": clean, "corrupted": corrupted}
        for sample, (one, seed, clean, corrupted) in enumerate(SCORES)
        for _ in range(1 + sample)  # as many rows as a group has runs must not weigh
    ]
    table = pd.DataFrame(rows)
    found = screen_table(table, "m", min_clean=20, max_corrupted=26)
    assert found.pairs == screening("m", SCORES).pairs
    assert set(zip(found.apply(table)["prompt_id"], found.apply(table)["seed"], strict=True)) == {("a", 0)}
    with pytest.raises(StudyError, match="no metric 'x' in the table: there are m"):
        screen_table(table, "x")
