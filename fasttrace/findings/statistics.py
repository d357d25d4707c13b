"""Intervals, ranks and tests over prompts: the prompt is the observation, so everything here takes one number a prompt.

Intervals are percentile bootstraps with Hesterberg's expansion (2015, "What teachers should know about the bootstrap",
section 3.2): the plain percentile interval of a mean is too narrow by about ``sqrt((n - 1) / n)`` and ignores that the
spread is estimated, so its tail ``alpha / 2`` is replaced by ``Phi(-sqrt(n / (n - 1)) t)``, with ``t`` the quantile of
Student's distribution. Resampling is scipy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..errors import StudyError

Array = NDArray[np.float64]

_RESAMPLES_AT_ONCE = 200


def expanded_confidence(confidence: float, n: int) -> float:
    """The nominal level at which a percentile interval of ``n`` observations holds ``confidence``."""
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    return float(1 - 2 * tail)


def mean_interval(values: Array, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[Array, Array]:
    """Interval of the mean over the last axis.

    Args:
        values: ``[..., n]``, one number a prompt.

    Returns:
        ``low, high``, each ``[...]``; NaN if ``n < 2``, since one prompt says nothing about another.
    """
    return _bootstrap((values,), np.mean, confidence, resamples, seed)


def ratio_interval(
    numerator: Array, denominator: Array, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Array, Array]:
    """Interval of ``mean(numerator) / mean(denominator)`` over the last axis, prompts resampled in pairs.

    The shape and the rule for ``n < 2`` are those of `mean_interval`.
    """

    def ratio(a: Array, b: Array, axis: int) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(a.mean(axis) / b.mean(axis))

    return _bootstrap((numerator, denominator), ratio, confidence, resamples, seed)


def rank_interval(values: Array, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[Array, Array]:
    """Interval of each row's rank by its mean, 1 the highest, all rows resampled with the same prompts.

    Args:
        values: ``[groups, n]``.

    Returns:
        ``low, high``, each ``[groups]``; NaN if ``n < 2``.
    """

    def ranks(sample: Array, axis: int) -> Array:
        return np.asarray(stats.rankdata(-sample.mean(axis), method="average", axis=0))

    return _bootstrap((values,), ranks, confidence, resamples, seed)


def sign_flip_p(differences: Array, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences ``[n]``: signs flipped at random, exactly while ``2^n`` allows.

    NaN if ``n < 2``.
    """
    if differences.shape[-1] < 2:
        return float("nan")
    result = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, rng=np.random.default_rng(seed)
    )
    return float(result.pvalue)


def _bootstrap(
    data: tuple[Array, ...], statistic: Callable[..., Any], confidence: float, resamples: int, seed: int
) -> tuple[Array, Array]:
    if not 0 < confidence < 1:
        raise StudyError(f"confidence={confidence!r}: expected a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise StudyError(f"resamples={resamples!r}: expected at least 1")
    n = data[0].shape[-1]
    if n < 2:
        missing = np.full(data[0].shape[:-1], np.nan)
        return missing, missing.copy()
    interval = stats.bootstrap(
        data,
        statistic,
        axis=-1,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=_RESAMPLES_AT_ONCE,
        confidence_level=expanded_confidence(confidence, n),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return np.asarray(interval.low), np.asarray(interval.high)
