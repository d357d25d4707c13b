"""Exponents are those of the power law that was measured, over the sizes that are said."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from bench import report
from bench.curves import CURVES, chosen
from bench.figures import plot_ratios, plot_scaling
from bench.fit import power_law


def points(engine: str, exponent: float, overhead: float) -> pd.DataFrame:
    sizes = [1, 10, 100, 1000, 10_000]
    seconds = [overhead + 1e-3 * size**exponent for size in sizes]
    rows = {"size": sizes, "median_s": seconds, "peak_mib": [5.0] * 5, "plan_gflop": [2.0 * size for size in sizes]}
    return pd.DataFrame({"engine": engine, "against": "patches", **rows})


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    law = power_law([1, 2, 4, 8, 16], [3 * size**1.5 for size in (1, 2, 4, 8, 16)])
    assert (law.exponent, law.factor) == pytest.approx((1.5, 3.0))
    assert (law.low, law.high) == (2, 16)
    assert law.at(100) == pytest.approx(3000)


def test_the_smallest_sizes_do_not_count() -> None:
    sizes, values = [1, 10, 100, 1000, 10_000], [100.0, 10, 100, 1000, 10_000]
    assert power_law(sizes, values).exponent == pytest.approx(1)


@pytest.mark.parametrize(("sizes", "values"), [([1], [1.0]), ([1, 2], [0.0, 1.0])])
def test_what_has_no_exponent_is_refused(sizes: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        power_law(sizes, values)


def test_each_curve_becomes_a_row_with_its_exponents() -> None:
    table = report.exponents(pd.concat([points("a", 1.0, 0.0), points("b", 2.0, 0.0)]))
    assert table["exponent of time"].tolist() == [1.0, 2.0]
    assert table["exponent of memory"].tolist() == [0.0, 0.0]
    assert table["exponent of operations"].tolist() == [1.0, 1.0]
    assert table["fitted from"].tolist() == ["10 to 10000"] * 2


def test_figures_are_written(tmp_path: Path) -> None:
    planner = pd.DataFrame({"patches": [10, 100, 1000], "median_s": [0.1, 0.2, 1.0]})
    plot_scaling(points("text, packed", 1.0, 0.1), planner, tmp_path / "scaling.png")
    ratios = pd.DataFrame({"what": ["a", "b"], "rival": ["x", None], "ratio": [0.5, None], "ratio_lowest": [0.4, None]})
    assert plot_ratios({"one": ratios}, tmp_path / "ratios.png")
    assert not plot_ratios({"none": ratios.iloc[1:]}, tmp_path / "none.png")
    for name in ("scaling.png", "ratios.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()


def test_every_curve_has_enough_sizes_to_fit() -> None:
    for curve in (curve for curves in CURVES.values() for curve in curves):
        assert len(curve.sizes) >= 4
        assert list(curve.sizes) == sorted(set(curve.sizes))


def test_chosen_runs_are_the_same_every_time_and_distinct() -> None:
    assert chosen(range(100), 20) == chosen(range(100), 20)
    assert len(set(chosen(range(100), 20))) == 20
