"""Reports: what is in the folder, that it agrees with the table, and that nothing half-written stays."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fasttrace.effects.effects import Effects
from fasttrace.errors import StudyError
from fasttrace.report import report
from fasttrace.report.pictures import _picture
from tests.synthetic import text_effects, unet_effects


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def links(page):
    parser = Links()
    parser.feed(page.read_text())
    return parser.found


def test_every_link_of_the_page_is_there_and_relative(tmp_path):
    page = report(unet_effects(prompts=2), tmp_path / "out")
    assert len(links(page)) >= 6
    assert all((page.parent / link).is_file() for link in links(page))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tables_are_those_of_the_effects(tmp_path):
    effects = unet_effects(prompts=3)
    page = report(effects, tmp_path / "out")
    ranked = pd.read_csv(page.parent / "clip_score-rank.csv")
    expected = effects.rank(by=["site", "kind", "layer"])
    assert ranked["site"].tolist() == expected["site"].tolist()
    np.testing.assert_allclose(ranked[["aie", "low", "high"]], expected[["aie", "low", "high"]])
    assert expected["site"][0] in page.read_text()
    pd.testing.assert_frame_equal(Effects.load(page.parent).table, effects.table, check_dtype=False)


def test_parts_of_one_file_name_keep_their_own_files(tmp_path):
    table = unet_effects(prompts=2).table
    long = "clip_score:/data/" + 90 * "x"
    other = table.assign(metric=f"{long}/b", indirect_effect=-table["indirect_effect"])
    page = report(
        Effects(pd.concat([table.assign(metric=f"{long}/a"), other], ignore_index=True), {}), tmp_path / "out"
    )
    tops = [pd.read_csv(path)["aie"][0] for path in sorted(page.parent.glob("*rank.csv"))]
    assert len(set(tops)) == 2
    assert len(set(links(page))) == len(links(page))


def test_text_is_escaped(tmp_path):
    table = text_effects().table.assign(prompt="<script>alert(1)</script>")
    assert "<script>" not in report(Effects(table, {"note": "<script>"}), tmp_path / "out").read_text()


def test_pictures_of_a_run_are_shown_with_their_scores(tmp_path):
    folder = unet_effects(prompts=1, seeds=1).save(tmp_path / "run")
    (folder / "pictures").mkdir()
    first = unet_effects(prompts=1, seeds=1).table.iloc[0]
    common = {"prompt_id": "p00", "prompt": first["prompt"], "seed": 0, "noise_sample": 0}
    restored = {"role": "strongest", "rank": 1, "site": first["site"], "position": None, "token_role": "all",
                "step_start": 0, "step_stop": 20, "metric": "clip_score"}  # fmt: skip
    entries = [common | {"file": f"{i}.png"} | one for i, one in enumerate(({"role": "clean"}, restored))]
    (folder / "pictures" / "index.json").write_text(json.dumps(entries))
    with pytest.raises(StudyError, match="listed in index"):
        report(folder)
    assert not (folder / "report").exists()
    for i in range(2):
        Image.new("RGB", (8, 8), "red").save(folder / "pictures" / f"{i}.png")
    assert "pictures-1.png" in links(report(folder))


def test_the_normalized_table_begins_with_the_strongest_and_the_heading_names_the_model_alone(tmp_path):
    effects = Effects(unet_effects(prompts=2).table, {"model": {"name": "/home/someone/models/own-model"}})
    page = report(effects, tmp_path / "out")
    ranked, normalized = (pd.read_csv(page.parent / f"clip_score-{name}.csv") for name in ("rank", "normalized"))
    assert normalized["site"].tolist() == ranked["site"].tolist()
    np.testing.assert_allclose(normalized["normalized"], ranked["share"])
    assert "model own-model</p>" in page.read_text()


def test_titles_of_pictures_name_the_steps_where_they_vary(tmp_path):
    effects = unet_effects(prompts=1, seeds=1, steps=[(0, 10), (10, 11)])
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    last = effects.table.iloc[1]
    entry = {"file": "0.png", "role": "strongest", "rank": 1, "step_start": 10, "step_stop": 11}
    entry |= {name: last[name] for name in ("prompt_id", "seed", "noise_sample", "site")}
    assert _picture(effects, tmp_path, entry).title == "strongest 1\nresnet\ndown 0 / 0\nstep 10"


def test_an_earlier_report_is_replaced_and_anything_else_is_kept(tmp_path):
    page = report(unet_effects(1, 1), tmp_path / "out")
    first = {path.name for path in page.parent.iterdir()}
    (page.parent / "notes.txt").write_text("x")
    renamed = unet_effects(1, 1)
    renamed.table["metric"] = "another"
    report(renamed, tmp_path / "out")
    left = {path.name for path in page.parent.iterdir()}
    assert "notes.txt" in left
    assert "another-rank.csv" in left
    assert not {name for name in first if name.startswith("clip_score")} & left
    site = tmp_path / "site"
    site.mkdir()
    for name in ("index.html", "photo.jpg"):
        (site / name).write_text("mine")
    with pytest.raises(StudyError, match="something other than a report"):
        report(unet_effects(1, 1), site)
    assert all(path.read_text() == "mine" for path in site.iterdir())
    (page.parent / "report.json").write_text('["../photo.jpg"]')
    with pytest.raises(StudyError, match="something other than a report"):
        report(unet_effects(1, 1), tmp_path / "out")
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("x")
    with pytest.raises(StudyError, match="something other than a report"):
        report(unet_effects(1, 1), other)
    assert (other / "chapter.tex").is_file()
    with pytest.raises(StudyError, match="give out="):
        report(unet_effects(1, 1))
