"""The ridge solve against the normal equations in float64, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttrace.edit.ridge import Prior, fold, reference, ridge_path, ridge_right
from fasttrace.errors import EditError


def problem(outputs: int, width: int, count: int, *, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh float32 ``W₀``, ``K`` and ``K*``; a small ``spread`` makes the keys nearly equal, as padding tokens are."""
    weight = torch.randn(outputs, width) / width**0.5
    centre = torch.randn(width, 1)
    return weight, centre + spread * torch.randn(width, count), centre + spread * torch.randn(width, count)


def solved(weight: Tensor, keys: Tensor, targets: Tensor, prior: Prior, keep: Tensor | None = None) -> Tensor:
    """The float32 path from keys to edited weight, as fits take it."""
    left, right = fold(weight @ (targets - keys), ridge_right(keys, prior, keep))
    return weight + left @ right.to(weight.dtype).T


def truth(weight: Tensor, keys: Tensor, targets: Tensor, ridge: float, **more: Tensor) -> Tensor:
    wide = weight.double() @ targets.double()
    keep = more.get("keep")
    if keep is not None:
        keys, wide = torch.cat([keys, keep], 1), torch.cat([wide, weight.double() @ keep.double()], 1)
    return reference(weight, keys, wide, ridge, more.get("gram"))


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("ridge", [10.0, 0.01, 1e-3])
@pytest.mark.parametrize(("width", "count"), [(33, 1), (33, 7), (20, 20), (17, 55), (3072, 5)])
def test_matches_float64(width: int, count: int, ridge: float) -> None:
    weight, keys, targets = problem(24, width, count)
    assert relative(solved(weight, keys, targets, Prior(ridge)), truth(weight, keys, targets, ridge)) <= 1e-6


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_nearly_equal_keys(spread: float) -> None:
    weight, keys, targets = problem(24, 96, 60, spread=spread)
    result = solved(weight, keys, targets, Prior(1e-3))
    assert relative(result, truth(weight, keys, targets, 1e-3)) <= 1e-6


@pytest.mark.parametrize(("count", "kept"), [(1, 3), (4, 9), (5, 70), (40, 3)])
def test_kept_keys(count: int, kept: int) -> None:
    weight, keys, targets = problem(16, 30, count)
    keep = torch.randn(30, kept)
    left, right = fold(weight @ (targets - keys), ridge_right(keys, Prior(0.01), keep))
    assert left.shape[1] == right.shape[1] == min(count, 30)
    result = weight + left @ right.float().T
    assert relative(result, truth(weight, keys, targets, 0.01, keep=keep)) <= 1e-6


@pytest.mark.parametrize("count", [2, 45])
def test_gram(count: int) -> None:
    weight, keys, targets = problem(16, 30, count)
    preserved = torch.randn(30, 80, dtype=torch.float64)
    gram = preserved @ preserved.T
    prior = Prior(0.05, gram)
    expected = truth(weight, keys, targets, 0.05, gram=gram)
    assert relative(solved(weight, keys, targets, prior), expected) <= 1e-6
    assert relative(solved(weight, keys, targets, prior), expected) <= 1e-6  # from the cached factor


def test_gram_of_kept_keys_equals_kept_keys() -> None:
    weight, keys, targets = problem(16, 30, 3)
    keep = torch.randn(30, 12)
    by_pairs = solved(weight, keys, targets, Prior(0.1), keep)
    by_gram = solved(weight, keys, targets, Prior(0.1, keep.double() @ keep.double().T))
    torch.testing.assert_close(by_pairs, by_gram)


@pytest.mark.parametrize("kept", [0, 4])
def test_path_equals_single_solves(kept: int) -> None:
    keys, keep = torch.randn(30, 6), torch.randn(30, kept)
    ridges = [1e-3, 0.3, 40.0]
    for ridge, right in zip(ridges, ridge_path(keys, ridges, keep), strict=True):
        torch.testing.assert_close(right, ridge_right(keys, Prior(ridge), keep), rtol=1e-9, atol=1e-12)


def test_without_ridge_independent_keys_are_mapped_exactly() -> None:
    weight, keys, targets = problem(16, 30, 5)
    result = solved(weight.double(), keys.double(), targets.double(), Prior(0.0))
    torch.testing.assert_close(result @ keys.double(), weight.double() @ targets.double())


def test_without_ridge_dependent_keys_are_refused() -> None:
    keys = torch.randn(30, 4)
    keys[:, 3] = keys[:, 0] - 2 * keys[:, 1]
    with pytest.raises(EditError, match="depend on each other"):
        ridge_right(keys, Prior(0.0))
    with pytest.raises(EditError, match="depend on each other"):
        ridge_right(torch.randn(10, 3), Prior(0.0, torch.zeros(10, 10)))


@pytest.mark.parametrize("ridge", [-0.1, float("nan"), float("inf")])
def test_bad_ridge(ridge: float) -> None:
    with pytest.raises(EditError, match="expected a number > 0"):
        Prior(ridge)
    with pytest.raises(EditError, match="expected a number > 0"):
        ridge_path(torch.randn(5, 2), [ridge, 0.0])


def test_bad_gram_and_keys() -> None:
    with pytest.raises(EditError, match=r"shape \[3, 4\]"):
        Prior(1.0, torch.zeros(3, 4))
    with pytest.raises(EditError, match="symmetric"):
        Prior(1.0, torch.randn(5, 5))
    with pytest.raises(EditError, match="takes 6 inputs"):
        ridge_right(torch.randn(6, 2), Prior(1.0, torch.eye(5)))
    with pytest.raises(EditError, match="finite"):
        ridge_right(torch.full((6, 2), float("nan")), Prior(1.0))
