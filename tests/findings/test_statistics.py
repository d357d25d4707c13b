"""Statistics against closed forms and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fasttrace.findings.statistics import expanded_confidence, mean_interval, rank_interval, ratio_interval, sign_flip_p


@pytest.mark.parametrize("n", [8, 20])
def test_interval_covers_the_true_mean_as_often_as_it_says(n):
    values = np.random.default_rng(n).normal(3.0, 2.0, (1500, n))
    low, high = mean_interval(values, 0.95, resamples=1500)
    coverage = ((low <= 3.0) & (high >= 3.0)).mean()
    # A standard error of coverage is 0.006; the plain percentile interval would cover 0.90 (n = 8) and 0.93 (n = 20).
    assert 0.925 < coverage < 0.97


def test_interval_comes_near_to_students_for_normal_data():
    values = np.random.default_rng(1).normal(0, 1, (200, 12))
    low, high = mean_interval(values, 0.95, resamples=4000)
    half = stats.t.ppf(0.975, 11) * values.std(1, ddof=1) / np.sqrt(12)
    assert np.median((high - low) / (2 * half)) == pytest.approx(1.0, abs=0.05)


def test_expansion_is_hesterbergs():
    n = 6
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    assert expanded_confidence(0.95, n) == pytest.approx(1 - 2 * tail)
    assert expanded_confidence(0.95, 10_000) == pytest.approx(0.95, abs=1e-3)


def test_one_prompt_has_no_interval_and_constant_data_none_of_any_width():
    low, high = mean_interval(np.array([[1.0], [2.0]]))
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    low, high = mean_interval(np.full((2, 5), 4.0))
    assert low.tolist() == high.tolist() == [4.0, 4.0]


def test_interval_does_not_depend_on_what_else_is_asked():
    values = np.random.default_rng(0).normal(size=(5, 7))
    together, alone = mean_interval(values), mean_interval(values[3:4])
    assert together[0][3] == alone[0][0]
    assert together[1][3] == alone[1][0]


def test_ratio_of_proportional_effects_is_exact():
    total = np.array([[2.0, 4.0, 6.0, 1.0]])
    low, high = ratio_interval(0.25 * total, total)
    np.testing.assert_allclose([low[0], high[0]], 0.25)


def test_ratio_interval_covers_the_true_ratio():
    rng = np.random.default_rng(5)
    total = rng.normal(10, 2, (800, 12))
    effect = 0.3 * total + rng.normal(0, 1, total.shape)
    low, high = ratio_interval(effect, total, resamples=1000)
    assert 0.92 < ((low <= 0.3) & (high >= 0.3)).mean() < 0.975


def test_ranks_of_equal_rows_are_equal_and_of_far_rows_certain():
    low, high = rank_interval(np.array([[9.0, 8.0, 9.5], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-5.0, -5.0, -6.0]]))
    assert low.tolist() == high.tolist() == [1.0, 2.5, 2.5, 4.0]


def test_ranks_of_noise_are_uncertain():
    low, high = rank_interval(np.random.default_rng(2).normal(size=(10, 6)))
    assert (high - low).mean() > 4


def test_sign_flips_are_exact_for_few_prompts():
    assert sign_flip_p(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(2 / 2**4)
    assert sign_flip_p(np.array([1.0, -1.0])) == pytest.approx(1.0)
    assert np.isnan(sign_flip_p(np.array([1.0])))


def test_sign_flips_reject_a_true_null_as_often_as_they_should():
    rng = np.random.default_rng(3)
    p = np.array([sign_flip_p(rng.normal(size=8), resamples=255) for _ in range(400)])
    assert (p <= 0.05).mean() < 0.09
    assert 0.4 < p.mean() < 0.6
