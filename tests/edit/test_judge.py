"""Judging: paired pictures, what is counted, the grid, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

import fasttrace as ft
from fasttrace.edit.cases import emoji_attribute, emoji_captions, emoji_cases, worded_cases
from fasttrace.edit.grid import save_grid
from fasttrace.edit.judge import AttributeReader, Case, ScoreReader, judge, pictures
from fasttrace.errors import EditError

CONCEPT = {"van gogh": "painting"}
CASES = [
    Case("a van gogh cat", "target", "a painting cat"),
    Case("van gogh on a table", "paraphrase", "painting on a table"),
    Case("a monet cat", "neighbour"),
    Case("a red apple", "unrelated"),
]
FAST: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def by_brightness(images: Tensor) -> list[dict[str, str]]:
    """A stand-in for a classifier: which channel is brightest, and whether the left half is brighter."""
    colours = images.mean((2, 3)).argmax(1).tolist()
    left = (images[..., : images.shape[-1] // 2].mean((1, 2, 3)) > images.mean((1, 2, 3))).tolist()
    return [{"colour": "rgb"[c], "side": "left" if side else "right"} for c, side in zip(colours, left, strict=True)]


class FakeScorer:
    """Pictures by their channel means; a text by the channel that its length chooses."""

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, texts: list[str]) -> Tensor:
        return torch.eye(3)[[len(text) % 3 for text in texts]]


def test_counts_what_the_reader_sees(tiny_sd15: Any) -> None:
    edit = ft.fit_edit(tiny_sd15, CONCEPT, method="uce")
    reader = AttributeReader(by_brightness, "colour", "r", "g")
    result = judge(tiny_sd15, edit, CASES, reader, seeds=[5, 6], scorer=FakeScorer(), **FAST)
    rows = [(case, seed) for case in CASES for seed in (5, 6)]
    assert [(row.prompt, row.seed) for row in result.table.itertuples()] == [(c.text, s) for c, s in rows]

    def alone(case: Case, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        images: Tensor = tiny_sd15(case.text, generator=generator, output_type="pt", **FAST).images
        return images[0]

    expected_before = torch.stack([alone(*row) for row in rows])
    with edit.applied(tiny_sd15):
        expected_after = torch.stack([alone(*row) for row in rows])
    torch.testing.assert_close(result.before, expected_before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.after, expected_after, rtol=1e-3, atol=1e-4)

    before, after = by_brightness(result.before), by_brightness(result.after)
    assert result.table["gone_before"].tolist()[:4] == [found["colour"] != "r" for found in before[:4]]
    assert result.table["gone_after"].tolist()[:4] == [found["colour"] != "r" for found in after[:4]]
    assert result.table["became"].tolist()[:4] == [found["colour"] == "g" for found in after[:4]]
    assert result.table["gone_after"][4:].isna().all()
    assert result.table["changed"].tolist() == [a != b for a, b in zip(before, after, strict=True)]
    assert result.efficacy == sum(found["colour"] != "r" for found in after[:4]) / 4
    assert result.specificity == sum(a == b for a, b in zip(before[6:], after[6:], strict=True)) / 2
    summary = result.summary()
    assert summary["about"].tolist() == ["target", "paraphrase", "neighbour", "unrelated"]
    assert summary["pictures"].tolist() == [2, 2, 2, 2]
    wanted = F.normalize(result.after[0].mean((1, 2)), dim=0)[len(CASES[0].wanted) % 3]
    assert result.table["clip_wanted"][0] == pytest.approx(100 * float(wanted), rel=1e-4)


def test_earlier_pictures_are_used_again(tiny_sd15: Any) -> None:
    edit = ft.fit_edit(tiny_sd15, CONCEPT)
    reader = AttributeReader(by_brightness, "colour", "r", "g")
    once = judge(tiny_sd15, edit, CASES, reader, seeds=[5], **FAST)
    again = judge(tiny_sd15, edit, CASES, reader, seeds=[5], before=once.before, **FAST)
    assert once.table.equals(again.table)


def test_score_reader_prefers_the_best_text() -> None:
    # Lengths choose the channel: "aaa" red, "bbbb" green, "ccccc" blue.
    reader = ScoreReader(FakeScorer(), ["aaa", "bbbb", "ccccc"])
    red, green = (torch.zeros(1, 3, 4, 4) for _ in range(2))
    red[:, 0], green[:, 1] = 1.0, 1.0
    case = [Case("aaa", "target", "bbbb")]
    assert not reader.gone(red, case).item()
    assert reader.gone(green, case).item()
    assert reader.became(green, case).item()
    assert reader.changed(red, green, case).item()
    assert not reader.changed(red, red, case).item()


def test_grid_holds_the_pictures(tiny_sd15: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    reader = AttributeReader(by_brightness, "colour", "r", "g")
    result = judge(tiny_sd15, ft.fit_edit(tiny_sd15, CONCEPT), CASES, reader, seeds=[5, 6], **FAST)
    grid = imread(save_grid(result, tmp_path / "new" / "grid.png"))
    assert grid.shape[0] > 4 * 100
    assert grid.shape[1] > 4 * 100
    assert len({tuple(pixel) for pixel in (grid.reshape(-1, grid.shape[-1])[::7] * 255).astype(int).tolist()}) > 50


def test_pictures_do_not_depend_on_the_batch(tiny: Any) -> None:
    texts, seeds = [case.text for case in CASES], [1, 2, 3, 4]
    together = pictures(tiny, texts, seeds, 2, 3.0)
    torch.testing.assert_close(together, pictures(tiny, texts, seeds, 2, 3.0, max_batch=3), rtol=1e-3, atol=1e-4)


def test_emoji_captions() -> None:
    captions = emoji_captions(50, seed=3)
    assert len(captions) == 50
    assert emoji_captions(50, seed=3) == captions != emoji_captions(50, seed=4)


def test_emoji_cases() -> None:
    cases = emoji_cases("striped style", "flat style", 5)
    assert [case.about for case in cases] == [
        a for a in ("target", "paraphrase", "neighbour", "unrelated") for _ in "12345"
    ]
    for case in cases:
        assert ("striped style" in case.text) == case.is_target
        if case.is_target:
            assert case.wanted == case.text.replace("striped style", "flat style")
    assert emoji_cases("striped style", "flat style", 5) == cases
    with pytest.raises(EditError, match="not values of one attribute"):
        emoji_attribute("striped style", "apple")


def test_worded_cases() -> None:
    cases = worded_cases("van gogh", "painting", ["monet"], ["a dog"])
    assert {case.about for case in cases} == {"target", "paraphrase", "neighbour", "unrelated"}
    assert Case("a photo of van gogh", "target", "a photo of painting") in cases
    assert Case("a photo of monet", "neighbour") in cases


@pytest.mark.parametrize(("about", "wanted"), [("target", ""), ("unrelated", "something"), ("nearby", "")])
def test_bad_cases(about: str, wanted: str) -> None:
    with pytest.raises(EditError, match=r"expected one of|have wanted"):
        Case("a cat", about, wanted)


def test_nothing_to_judge(tiny_sd15: Any) -> None:
    edit, reader = ft.fit_edit(tiny_sd15, CONCEPT), AttributeReader(by_brightness, "colour", "r", "g")
    with pytest.raises(EditError, match="at least one case"):
        judge(tiny_sd15, edit, [], reader)


def test_command_saves_an_edit_that_loads(tmp_path: Path) -> None:
    from fasttrace.cli.app import app

    out = tmp_path / "edit"
    arguments = ["edit", "van gogh=painting", "--model", "random:tiny-sd15", "--preserve", "monet", "--lora"]
    (tmp_path / "kept.txt").write_text("a red apple\n\na van gogh\ntwo horses\n")
    arguments += ["--captions", str(tmp_path / "kept.txt")]
    result = CliRunner().invoke(app, [*arguments, "--method", "uce", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "rank 1 in 8 matrices" in result.output
    assert "held back by 2 captions" in " ".join(result.output.split())
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    edit, pipe = ft.load_edit(out), ft.zoo.random_pipeline("tiny-sd15")
    expected = ft.fit_edit(pipe, CONCEPT, method="uce", preserve=["monet"], captions=["a red apple", "two horses"])
    assert edit.recipe == expected.recipe
    with edit.applied(pipe):
        pass


@pytest.mark.parametrize(("option", "expected"), [(["--guidance", "0"], 0.0), ([], 7.5)])
def test_command_hands_on_the_guidance(
    option: list[str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrace.cli.app import app

    asked: list[float] = []

    def stop(*_: Any, guidance_scale: float, **__: Any) -> None:
        asked.append(guidance_scale)
        raise EditError("seen")

    monkeypatch.setattr("fasttrace.edit.judge.judge", stop)
    monkeypatch.setattr("fasttrace.cli.edit._court", lambda *_: ([], None, None))
    arguments = ["edit", "van gogh=painting", "--model", "random:tiny-sd15", "--judge", "any", *option]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "edit")])
    assert "seen" in result.output
    assert asked == [expected]


@pytest.mark.parametrize("words", ["van gogh", "=painting", "van gogh="])
def test_command_refuses_words_that_are_no_concept(words: str, tmp_path: Path) -> None:
    from fasttrace.cli.app import app

    result = CliRunner().invoke(app, ["edit", words, "--model", "random:tiny-sd15", "--out", str(tmp_path / "edit")])
    assert result.exit_code == 2
    assert not (tmp_path / "edit").exists()
