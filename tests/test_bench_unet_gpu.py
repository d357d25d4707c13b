"""The UNet's GPU suite at its toy shapes: every contender that a CPU can run, its rows and its profile."""

from __future__ import annotations

import csv
import sys

from bench import bench_unet_gpu, record


def test_the_suite_runs_and_writes_as_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    table = tmp_path / "profile.txt"
    monkeypatch.setattr(bench_unet_gpu, "PROFILED_ROWS", 6)
    monkeypatch.setattr(sys, "argv", ["bench", "--toy", "--rows", "6", "--profile", str(table)])
    bench_unet_gpu.main()
    with (tmp_path / "unet_gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == ["eager", "hooks", "engine"]
    assert all(float(row["ms_row"]) > 0 and row["rows"] == "6" for row in rows)
    assert "== engine, 6 rows" in table.read_text()


def test_a_contender_that_cannot_run_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    bench = bench_unet_gpu.Bench(toy=True)

    def broken():
        raise RuntimeError("no such mode\nand why")

    bench_unet_gpu.measure(bench, 2, {"eager": bench.first(2)["eager"], "captured": broken})
    printed = capsys.readouterr().out
    assert "captured               cannot run: ['no such mode']" in printed
    with (tmp_path / "unet_gpu.csv").open(newline="") as file:
        assert [row["contender"] for row in csv.DictReader(file)] == ["eager"]
