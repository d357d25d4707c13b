"""RESULTS.md says what the CSV files say, newest rows first in rank."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench import report


def test_the_newest_row_of_each_case_counts() -> None:
    table = pd.DataFrame({"what": ["a", "b", "a"], "median_s": [1.0, 2.0, 3.0], "date": ["x", "y", "z"]})
    assert report.newest(table)[["what", "median_s"]].to_numpy().tolist() == [["b", 2.0], ["a", 3.0]]


def test_every_suite_becomes_a_table_with_its_command_and_origin(tmp_path: Path) -> None:
    rows = {"what": ["a|b"], "ratio": [1.25], "empty": [None], "date": ["2026-01-02"], "commit": ["abc"]}
    pd.DataFrame({**rows, "machine": ["m"], "versions": ["v"]}).to_csv(tmp_path / "text.csv", index=False)
    pd.DataFrame({"what": ["c"], "ratio": [0.5]}).to_csv(tmp_path / "own.csv", index=False)
    report.main(tmp_path, tmp_path / "RESULTS.md")
    written = (tmp_path / "RESULTS.md").read_text()
    assert "`python -m bench.bench_text`" in written
    assert "| a/b | 1.25 |" in written
    assert "empty" not in written
    assert "2026-01-02, commit abc, m, v" in written
    assert written.index("Text encoder sweep") < written.index("| c | 0.5 |")


def test_a_range_shares_a_column_and_what_never_varies_stands_above(tmp_path: Path) -> None:
    rows = {
        "what": ["a", "b"], "rival": ["x", "y"], "model": ["m", "m"], "ratio": [2.0, 0.5], "ratio_lowest": [1.5, 0.25],
        "ratio_highest": [3.0, 0.75], "gone": [0.5, 1.0], "gone_interval": ["0.1 to 0.9", "0.8 to 1.0"],
    }  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    report.main(tmp_path, tmp_path / "RESULTS.md")
    written = (tmp_path / "RESULTS.md").read_text()
    assert "In every row: model m." in written
    assert "| what | rival | times faster | gone |" in written
    assert "| b | y | 0.5 (0.25 to 0.75) | 1 (0.8 to 1.0) |" in written
    assert "(ratios.png)" in written
    assert (tmp_path / "ratios.png").exists()


def test_rows_beside_a_rival_have_a_table_of_their_own(tmp_path: Path) -> None:
    rows = {"what": ["a", "b"], "floor_s": [1.0, None], "rival": [None, "y"], "ratio": [None, 2.0]}
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    report.main(tmp_path, tmp_path / "RESULTS.md")
    written = (tmp_path / "RESULTS.md").read_text()
    assert "| what | floor s |" in written
    assert "| what | rival | times faster |" in written
