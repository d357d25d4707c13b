"""The counter-based generator and the corruption scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import fasttrace as ft
from fasttrace.corruption import philox4x32
from fasttrace.errors import PatchError


def words(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    return tuple(int(w[0]) for w in philox4x32(seed, *(np.array([c], np.uint64) for c in counter)))


def test_philox_gives_the_published_known_answers() -> None:
    """Known-answer vectors of Random123 (Salmon et al., 2011) for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert words(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert words(ones << 32 | ones, (ones, ones, ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    key = 0x299F31D0 << 32 | 0xA4093822
    assert words(key, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_a_draw_depends_on_its_own_key_and_counter_only() -> None:
    whole = ft.philox_normal(7, 2, range(10), 33)
    assert torch.equal(ft.philox_normal(7, 2, [9, 4], 33), whole[[9, 4]])
    assert torch.equal(ft.philox_normal(7, 2, range(10), 14), whole[:, :14])
    for other in (ft.philox_normal(8, 2, range(10), 33), ft.philox_normal(7, 3, range(10), 33)):
        assert (other != whole).all()


def test_draws_are_standard_normal_and_uncorrelated() -> None:
    draws = ft.philox_normal(123, 0, range(300), 1001).double()
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:, :-1].flatten(), draws[:, 1:].flatten())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:-1].flatten(), draws[1:].flatten())[0, 1]) < 0.01


def test_a_relative_scale_is_a_multiple_of_the_subjects_spread() -> None:
    table = torch.randn(20, 8, dtype=torch.float64)
    resolved = ft.GaussianNoise("3x").resolve(table, [3, 5, 5])
    assert resolved == pytest.approx(3 * table[[3, 5]].std(correction=0).item())
    assert ft.GaussianNoise(0.25).resolve(table, []) == 0.25
    with pytest.raises(PatchError, match="no subjects"):
        ft.GaussianNoise("3x").resolve(table, [])


def test_noise_stands_at_the_given_positions_only() -> None:
    noise = ft.GaussianNoise(0.5).draw(0.5, sample=1, length=9, positions=[2, 6], channels=5)
    assert torch.equal(noise[[2, 6]], 0.5 * ft.philox_normal(0, 1, [2, 6], 5))
    assert not noise[[0, 1, 3, 4, 5, 7, 8]].any()


@pytest.mark.parametrize("scale", [-1, "x", "-2x", "three", float("nan"), float("inf"), None, [3]])
def test_bad_scales_are_refused(scale: Any) -> None:
    with pytest.raises(PatchError, match="scale"):
        ft.GaussianNoise(scale)


def test_no_samples_are_refused() -> None:
    with pytest.raises(PatchError, match="samples=0"):
        ft.GaussianNoise(samples=0)


@pytest.mark.parametrize("given", [{"samples": 1.5}, {"samples": "2"}, {"samples": True}, {"seed": "first"}])
def test_samples_and_seeds_are_whole_numbers(given: dict[str, Any]) -> None:
    with pytest.raises(PatchError, match="expected a whole number"):
        ft.GaussianNoise(1.0, **given)
