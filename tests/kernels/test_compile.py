"""Every config of every kernel, compiled for sm_80 and sm_90, and one of each for sm_100, where there is none."""

from __future__ import annotations

import csv
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from bench.compile_report import COLUMNS, RESULTS, all_cases, compile_case

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTIONS = {80: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}
CASES = [(case, arch) for case in all_cases() for arch in case.archs]


@pytest.mark.parametrize(("case", "arch"), CASES, ids=[f"{c.kernel}-{c.config}-sm{a}" for c, a in CASES])
def test_fits_the_architecture(case, arch):
    row = compile_case(case, arch)
    assert row["spill_bytes"] == 0
    assert 0 < row["registers"] <= 255
    assert row["shared_bytes"] <= SHARED_LIMIT[arch]
    assert row["mma"] in (MATRIX_INSTRUCTIONS[arch] if case.has_dot else {"none"})


def test_the_committed_report_lists_every_config_once():
    with RESULTS.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [(row["kernel"], row["config"], row["arch"]) for row in reader]
    assert tuple(reader.fieldnames or ()) == COLUMNS
    assert sorted(rows) == sorted((c.kernel, c.config, f"sm_{a}") for c, a in CASES), "run `make compile-report`"
