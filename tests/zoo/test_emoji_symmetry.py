"""The scorer's image tower knows quarter turns, when it starts, after a step of training, and as packaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrace.zoo.emoji import architecture, model, symmetry
from fasttrace.zoo.emoji.muon import Muon


def turned_states(states: Tensor) -> Tensor:
    """What a symmetric tower makes of a picture turned once, from its states of the picture [B, 17, D]."""
    places = torch.rot90(states[:, 1:].unflatten(1, (4, 4)), 1, (1, 2)).flatten(1, 2)
    return torch.cat([states[:, :1], places], dim=1).roll(states.shape[-1] // symmetry.TURNS, -1)


def states_of(tower: Any, pictures: Tensor) -> Tensor:
    states: Tensor = tower(pixel_values=pictures).last_hidden_state
    return states


def assert_symmetric(tower: Any, tolerance: float) -> None:
    pictures = torch.rand(3, 3, 64, 64, dtype=next(tower.parameters()).dtype) * 2 - 1
    states = states_of(tower, pictures)
    turned = states_of(tower, torch.rot90(pictures, 1, (-2, -1)))
    assert (turned - turned_states(states)).abs().max() < tolerance * states.abs().max()
    assert (turned - states).abs().max() > 10 * tolerance * states.abs().max()  # the picture is not its own turn


def random_tower() -> Any:
    tower = architecture.clip(700, 1, 2).vision_model.double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(0, 0.3)
    return tower


def test_a_tower_is_symmetric_once_projected_and_stays_so_in_training() -> None:
    tower = random_tower()
    with pytest.raises(AssertionError):
        assert_symmetric(tower, 1e-3)
    symmetry.impose(tower)
    symmetry.keep(tower)
    assert_symmetric(tower, 1e-12)
    optimizer = Muon(tower.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        states_of(tower, torch.randn(2, 3, 64, 64, dtype=torch.float64))[:, 0, :7].sum().backward()
        optimizer.step()
    assert_symmetric(tower, 1e-3)  # Muon's orthogonalisation is in bf16


def test_projecting_twice_is_projecting_once() -> None:
    for name, parameter in random_tower().named_parameters():
        once = symmetry.project(name, parameter)
        torch.testing.assert_close(symmetry.project(name, once), once)
        assert not torch.allclose(once, parameter)


def test_the_packaged_scorer_is_symmetric() -> None:
    assert_symmetric(model.load_scorer("cpu").clip.vision_model, 1e-4)
