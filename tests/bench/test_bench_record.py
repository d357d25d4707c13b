"""Benchmark results keep what was there, and say where they come from."""

from __future__ import annotations

import csv
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as benches
from bench import record
from bench.timing import Timing, interleaved
from fasttrace.profile.peak import peak_of


def test_rows_are_appended_and_new_columns_reach_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.append("text", [{"case": "a", "median_s": 1.5}])
    path = record.append("text", [{"case": "b", "median_s": 2.5, "ratio": 3}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["median_s"], r["ratio"]) for r in rows] == [("a", "1.5", ""), ("b", "2.5", "3")]
    assert all(r["machine"] and r["versions"].startswith("python") for r in rows)


@pytest.mark.parametrize(("arguments", "files"), [(["text"], []), (["--full", "text"], ["text.csv"])])
def test_only_the_full_form_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], files: list[str]
) -> None:
    def measure(command: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        monkeypatch.setattr(os, "environ", env)
        record.append(command[2].removeprefix("bench.bench_"), [{"case": "a", "median_s": 9.0}])
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv(record.SWITCH, raising=False)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "provenance", dict)
    monkeypatch.setattr(benches, "subprocess", SimpleNamespace(run=measure))
    assert benches.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == files


def test_contenders_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round() -> None:
    fast, slow = Timing((1.0, 2.0, 4.0)), Timing((3.0, 4.0, 4.0))
    assert fast.ratio_to(slow) == (1.0, 2.0, 3.0)
    assert slow.median == 4.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no high-water mark")
def test_a_peak_is_what_a_call_held_at_most() -> None:
    mib = 2**20

    def hold(size: int) -> None:
        # Straight from the system: an allocator may serve a call from what earlier ones left in its heap.
        with mmap.mmap(-1, size * mib) as pages:
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1

    def takes(size: int) -> Callable[[], None]:
        def run() -> None:
            hold(size)
            hold(10)

        return run

    takes(200)()  # an earlier, higher mark does not count
    peaks = {size: peak_of(takes(size))[1] for size in (50, 100)}
    assert all(peak is not None and abs(peak - size * mib) < 5 * mib for size, peak in peaks.items()), peaks
    held = torch.ones(100 * mib // 4)
    result, peak = peak_of(lambda: held.sum())
    assert float(result) == held.numel()
    assert peak is not None
    assert peak < 5 * mib
    timing = interleaved({"a": takes(50)}, rounds=1, warmup=1)["a"]
    assert timing.peak_mib == pytest.approx(50, abs=5)
    assert Timing((1.0,)).peak_mib == ""
