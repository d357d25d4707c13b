"""Files of a run are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from fasttrace.errors import StudyError
from fasttrace.findings.folder import load_effects, read_json, replacing, save_effects, temporary_beside, write_json
from fasttrace.study.store import Shards, content_hash

TABLE = pd.DataFrame({"site": ["a", "b"], "position": pd.array([1, None], dtype="Int64"), "restored": [0.5, 0.25]})


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_other(error: type[BaseException], tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"old": True})

    def fail() -> None:
        with replacing(tmp_path / "x.json") as temporary:
            temporary.write_text("half of")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == {"x.json"}
    assert read_json(tmp_path / "x.json") == {"old": True}


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    own = temporary_beside(target)
    dead, living = own.with_suffix(".999999999"), own.with_suffix(f".{os.getppid()}")
    other = tmp_path / ".x.json.another-machine.999999999"
    dead.mkdir()
    (dead / "half").write_text("")
    living.write_text("")
    other.write_text("")
    write_json(target, {})
    assert names(tmp_path) == {target.name, living.name, other.name}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_effects(tmp_path, TABLE, {})
    (tmp_path / "effects.parquet").write_bytes((tmp_path / "effects.parquet").read_bytes()[:50])
    with pytest.raises(StudyError, match=r"effects\.parquet is damaged"):
        load_effects(tmp_path)
    shards = Shards(tmp_path, {})
    shards.put("a", TABLE, torch.zeros(3))
    for suffix in ("parquet", "safetensors"):
        (tmp_path / "partial" / f"a.{suffix}").write_bytes(b"half")
    with pytest.raises(StudyError, match=r"a\.parquet is damaged"):
        shards.rows("a")
    with pytest.raises(StudyError, match=r"a\.safetensors is damaged"):
        shards.latents("a")


def test_effects_are_written_both_or_neither(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_effects(tmp_path / "run", TABLE, {"not": object()})
    assert names(tmp_path) == set()
    save_effects(tmp_path / "run", TABLE, {"seeds": [0]})
    table, record = load_effects(tmp_path / "run")
    pd.testing.assert_frame_equal(table, TABLE)
    assert record == {"seeds": [0]}
    assert names(tmp_path / "run") == {"effects.parquet", "study.json"}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no effects\.parquet in .*expected the folder of a finished run$"):
        load_effects(tmp_path)
    Shards(tmp_path, {"seeds": [0]})
    with pytest.raises(StudyError, match="one was begun there"):
        load_effects(tmp_path)
    (tmp_path / "bad.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(StudyError, match=r"bad\.json, line 3: not JSON"):
        read_json(tmp_path / "bad.json")


def test_shards_come_back_and_other_settings_do_not_mix(tmp_path: Path) -> None:
    settings = {"seeds": [0], "guidance_scale": 7.5}
    latents = torch.arange(6.0).reshape(2, 3).half()
    Shards(tmp_path, settings).put("key", TABLE, latents)
    again = Shards(tmp_path, settings)
    rows, kept = again.rows("key"), again.latents("key")
    assert rows is not None
    assert kept is not None
    pd.testing.assert_frame_equal(rows, TABLE)
    assert torch.equal(kept, latents)
    assert again.rows("other") is None
    assert again.latents("other") is None
    with pytest.raises(StudyError, match=r"holds another study: its guidance_scale is 7.5, this one's is 5.0"):
        Shards(tmp_path, {**settings, "guidance_scale": 5.0})
    fresh = Shards(tmp_path, {**settings, "guidance_scale": 5.0}, overwrite=True)
    assert fresh.rows("key") is None
    fresh.clear_if_empty(and_folder=True)
    assert not tmp_path.exists()


def test_a_content_hash_depends_on_the_content_alone() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
