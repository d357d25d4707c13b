"""The GPU benchmark as far as a CPU carries it: contenders agree at toy shapes, winners are picked right."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

from bench import record
from bench.gpu import choose, measure
from bench.gpu.choose import winners
from bench.gpu.clock import Ceilings
from bench.gpu.measure import cases, is_ours, judge, ops, rows
from fasttrace.ops import selection
from fasttrace.ops.linear_restore import shape_class as linear_class

TOYS = [case for op in ops() for case in cases(op, toy=True)]
NEEDS_GPU = ("cudnn", "flash", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers")


@pytest.mark.parametrize("case", TOYS, ids=[f"{case.op}-{case.shape}" for case in TOYS])
def test_contenders_agree(case):
    with torch.device("cpu"), torch.no_grad():
        contenders = case.contenders()
        on_cpu = {
            name: run
            for name, run in contenders.items()
            if not is_ours(name) and name not in NEEDS_GPU and "compile" not in name
        }
        verdicts = judge(case, on_cpu)
    assert {"reference", "triton"} <= contenders.keys() or {"reference", "cuda"} <= contenders.keys()
    assert verdicts
    assert not any(verdicts.values()), verdicts


@pytest.mark.parametrize("op", ops())
def test_true_shapes_have_work_and_a_bound(op):
    for case in cases(op):
        assert case.op == op
        assert case.bytes > 0
        assert case.bound in ("compute", "memory")
        assert case.flops > 0 or case.bound == "memory"


def test_a_contender_that_differs_or_raises_is_not_timed():
    case = cases("attention_restore", toy=True)[0]
    value = torch.ones(3)

    def broken() -> torch.Tensor:
        raise RuntimeError("no such device\nand a long story")

    verdicts = judge(
        case, {"reference": lambda: value, "torch": lambda: value, "sdpa": lambda: 2 * value, "triton": broken}
    )
    assert verdicts["torch"] == ""
    assert verdicts["sdpa"].startswith("differs by 1.00e+00")
    assert verdicts["triton"] == "cannot run: no such device"
    table = rows(case, {"torch": 2e-6}, verdicts, Ceilings(flops=1e12, bytes=1e12))
    assert [row.get("time_us") for row in table] == ["2.00", None, None]
    assert table[0]["ratio_to_best_rival"] == "1.000"


def test_the_fastest_implementation_over_all_shapes_of_a_class_wins():
    def row(shape, contender, time_us, status="ok"):
        names = {"op": "geglu", "shape_class": "wide", "shape": shape, "contender": contender}
        return {**names, "time_us": str(time_us), "status": status}

    measured = [
        *(row("a", name, t) for name, t in (("torch", 10), ("triton", 5), ("compile", 1), ("triton 64x64", 1))),
        *(row("b", name, t) for name, t in (("torch", 10), ("triton", 30), ("cuda", 1))),
        row("a", "cuda", "", "differs by 1"),
    ]
    (won,) = winners(measured, {"geglu": ("reference", "torch", "triton", "cuda")})
    assert (won["implementation"], won["rival"]) == ("torch", "triton")
    (won,) = winners([*measured, row("b", "triton", 6)], {"geglu": ("torch", "triton")})
    assert (won["implementation"], won["time_us"]) == ("triton", "5.48")


def test_measuring_writes_rows_and_choosing_writes_the_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "selection.csv"
    table.write_text(",".join(selection.COLUMNS) + "\ngeglu,wide,90,triton,5.0,,,a GPU,2.11.0,3.6.0\n")
    monkeypatch.setattr(selection, "TABLE", table)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "ceilings", lambda: Ceilings(flops=8e14, bytes=3e12))
    monkeypatch.setattr(
        measure, "median_seconds", lambda calls, trying: {name: 2e-6 for name in calls if calls[name]() is not None}
    )
    measure.measure("attention_restore", device="cpu", toy=True)
    printed = capsys.readouterr().out
    assert "torch                          2.00 us" in printed
    assert "xformers                 cannot run" in printed

    machine = record.provenance()["machine"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: machine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choose.main()
    with table.open(newline="") as file:
        chosen = [(row["op"], row["shape_class"], row["arch"], row["implementation"]) for row in csv.DictReader(file)]
    classes = {case.shape_class for case in cases("attention_restore", toy=True)}
    assert chosen == [
        *(("attention_restore", c, "90", "torch") for c in sorted(classes)),
        ("geglu", "wide", "90", "triton"),
    ]


def test_a_quick_measurement_has_one_case_a_shape_class():
    classes = [case.shape_class for case in cases("attention_restore", quick=True)]
    assert len(classes) == len(set(classes)) > 1
    assert set(classes) == {case.shape_class for case in cases("attention_restore")}


def test_linear_restore_is_measured_under_the_classes_that_it_asks_for():
    for case in cases("linear_restore", toy=True):
        with torch.device("cpu"):
            x, weight = torch.empty(4, 6, 10), torch.empty(12, 10)
        assert case.shape_class == linear_class(x, weight) == "n12_k10_few"


def test_every_case_compiles_afresh_and_what_ended_a_process_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "ceilings", lambda: Ceilings(flops=8e14, bytes=3e12))
    monkeypatch.setattr(measure, "median_seconds", lambda calls, trying: dict.fromkeys(calls, 2e-6))
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    measure.measure("attention_restore", device="cpu", toy=True, first=7, without={(8, "torch")})
    count = len(cases("attention_restore", toy=True))
    assert len(resets) == count - 7
    printed = capsys.readouterr().out
    assert "trying 7 torch" in printed
    assert "trying 8 torch" not in printed
    with (tmp_path / "gpu_kernels.csv").open(newline="") as file:
        assert [row["contender"] for row in csv.DictReader(file) if "ended the process" in row["status"]] == ["torch"]
    measure.measure("attention_restore", device="cpu", toy=True, until=0.0)
    assert f"{count} of {count} cases not measured" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the stages would run")
def test_without_a_gpu_it_says_what_it_would_run_and_why_it_stops():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=True)
    assert all(f"\n{op}\n" in "\n" + done.stdout for op in ops())
    assert "sees no NVIDIA GPU" in done.stdout
