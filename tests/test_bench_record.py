"""Benchmark results keep what was there, and say where they come from."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import record
from bench.timing import Timing, interleaved


def test_rows_are_appended_and_new_columns_reach_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.append("text", [{"case": "a", "median_s": 1.5}])
    path = record.append("text", [{"case": "b", "median_s": 2.5, "ratio": 3}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["median_s"], r["ratio"]) for r in rows] == [("a", "1.5", ""), ("b", "2.5", "3")]
    assert all(r["machine"] and r["versions"].startswith("python") for r in rows)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round() -> None:
    fast, slow = Timing((1.0, 2.0, 4.0)), Timing((3.0, 4.0, 4.0))
    assert fast.ratio_to(slow) == (1.0, 2.0, 3.0)
    assert slow.median == 4.0
