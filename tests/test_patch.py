"""What a patch is, and what it does to a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fasttrace as ft
from fasttrace.engine.values import apply_patch, from_positions, given_value, to_positions
from fasttrace.errors import PatchError
from fasttrace.patch import as_runs

SITE = "unet.mid_block.resnets.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "subjects"}, "subject_first"),
        ({"branch": "conditional"}, "uncond"),
        ({"source": 3}, "ZERO"),
        ({"positions": ["a"]}, "integers"),
        ({"steps": [None]}, "integers"),
        ({"positions": [1.5]}, "integers"),
        ({"positions": torch.tensor([1.0, 2.0])}, "integers"),
        ({"positions": [False, True, True]}, "indices that are True"),
        ({"positions": torch.tensor([False, True, True])}, "indices that are True"),
        ({"positions": np.array([False, True])}, "indices that are True"),
    ],
)
def test_malformed_patches_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        ft.Patch(SITE, **arguments)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (ft.Patch(SITE, positions="subject"), "role"),
        (ft.Patch(SITE, positions=[4]), "position 4 is out of range: expected 0 to 3"),
        (ft.Patch(SITE, positions=[-1]), "position -1"),
        (ft.Patch(SITE, steps=[0, 9]), "step 9"),
        (ft.Patch(SITE, source="other"), "clean, corrupted"),
    ],
)
def test_patches_outside_a_trace_are_refused(patch: ft.Patch, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        patch.within(positions=4, steps=9, known_sources=["clean", "corrupted"])


def test_steps_of_a_text_patch_are_refused_but_for_none_at_all() -> None:
    with pytest.raises(PatchError, match="before denoising"):
        ft.Patch(SITE, steps=[0]).within(4, None, ["clean"])
    ft.Patch(SITE, steps=[]).within(4, None, ["clean"])
    assert ft.Patch(SITE, steps=[]).is_empty
    assert ft.Patch(SITE, positions=range(0)).is_empty
    assert not ft.Patch(SITE).is_empty


def test_runs_are_tuples_of_patches() -> None:
    one, two = ft.Patch(SITE), ft.Patch(SITE, steps=range(3))
    assert as_runs([one, [one, two], ()]) == [(one,), (one, two), ()]
    assert two.steps == (0, 1, 2)
    assert ft.Patch(SITE, torch.tensor([2, 4]), np.arange(2)).positions == (2, 4)
    for wrong in ([SITE], None, 3):
        with pytest.raises(PatchError, match=r"patches\[0\]"):
            as_runs([wrong])
    with pytest.raises(PatchError, match="expected a list, with one element for each run"):
        as_runs(one)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf"), "much", None])
def test_noise_of_no_finite_size_is_refused(sigma: object) -> None:
    with pytest.raises(PatchError, match="expected a finite number >= 0"):
        ft.Noise(sigma)


@pytest.mark.parametrize("shape", [(6, 5), (5, 2, 3)])
@pytest.mark.parametrize("where", [None, (), (0, 4), (5,)])
def test_each_source_changes_the_named_positions_and_no_other(shape: tuple[int, ...], where: tuple | None) -> None:
    value, other = torch.randn(shape), torch.randn(shape)
    before = value.clone()
    given = torch.randn(6, 5)
    noise = ft.Noise(0.7, seed=4)
    expected = {
        "copy": ("clean", lambda v: to_positions(other[None])[0]),
        "zero": (ft.ZERO, torch.zeros_like),
        "given": (given, lambda v: given),
        "add": (ft.Add(given), lambda v: v + given),
        "noise": (noise, lambda v: v + 0.7 * ft.philox_normal(4, 0, range(6), 5)),
    }
    table = to_positions(value[None])[0]
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(range(6) if where is None else where)] = True
    for source, change in expected.values():
        result = to_positions(apply_patch(value, ft.Patch(SITE, where, source=source), other)[None])[0]
        assert torch.equal(result[~mask], table[~mask])
        torch.testing.assert_close(result[mask], change(table)[mask])
    assert torch.equal(value, before)


def test_given_tensors_may_be_a_vector_a_table_or_a_feature_map() -> None:
    patch = ft.Patch(SITE)
    vector, table, picture = torch.randn(5), torch.randn(6, 5), torch.randn(5, 2, 3)
    assert torch.equal(given_value(patch, vector, 6, 5, (2, 3)), vector.expand(6, 5))
    assert torch.equal(given_value(patch, table, 6, 5, (2, 3)), table)
    assert torch.equal(given_value(patch, picture, 6, 5, (2, 3)), to_positions(picture[None])[0])
    for wrong in (torch.randn(6), torch.randn(5, 6), torch.randn(5, 3, 2)):
        with pytest.raises(PatchError, match=r"expected \[5\] or \[6, 5\] or \[5, 2, 3\]"):
            given_value(patch, wrong, 6, 5, (2, 3))


def test_positions_are_pixels_in_row_major_order() -> None:
    value = torch.arange(24.0).reshape(1, 4, 2, 3)
    table = to_positions(value)
    assert table.shape == (1, 6, 4)
    assert torch.equal(table[0, 4], value[0, :, 1, 1])
    assert torch.equal(from_positions(table, value), value)
