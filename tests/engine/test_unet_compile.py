"""The compiled graph: equal to the oracle, one for all mixes of patches, unbroken."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.engine import unet_compile
from tests.engine.unet_cases import both, difference, unet_sites


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs are traced whole but left to eager kernels, which takes seconds; counts how many there are."""
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(unet_compile.torch, "compile", functools.partial(torch.compile, backend=count, fullgraph=True))
    return graphs


def test_one_graph_for_every_mix_of_patches(traced: list[int]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    sites = unet_sites(pipe)
    mixes: list[list[Any]] = [
        [ft.Patch(site) for site in sites[:6]],
        [ft.Patch(site, positions=[1, 2], branch="both") for site in sites[6:12]],
        [ft.Patch(sites[1], source=ft.ZERO), (ft.Patch(sites[2]), ft.Patch(sites[9], source="other"))] * 3,
    ]
    for mix in mixes:
        assert difference(*both(pipe, mix, compile=True, max_batch=16)) < 1e-8
    # Sixteen rows, or the eight that are left over.
    assert len(traced) <= 2


def test_given_tensors_and_several_maps(traced: list[int]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    sites = unet_sites(pipe)
    mix = [
        ft.Patch(sites[0], source=ft.Noise(0.5, 1)),
        (ft.Patch(sites[3]), ft.Patch(sites[3], positions=[0, 5], source=ft.Add(torch.ones(16, dtype=torch.float64)))),
        ft.Patch("unet.mid_block.attentions.0", steps=[1, 2]),
    ]
    assert difference(*both(pipe, mix, compile=True, max_batch=8)) < 1e-8
    assert traced


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_every_architecture(tiny: Any, traced: list[int], protocol: str) -> None:
    mix = [ft.Patch(site) for site in unet_sites(tiny)[::4]]
    oracle, fast = both(tiny, mix, compile=True, protocol=protocol, num_inference_steps=2)
    torch.testing.assert_close(fast.restored, oracle.restored, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_with_torchs_own_compiler() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    assert difference(*both(pipe, [ft.Patch(site) for site in unet_sites(pipe)[:2]], compile=True)) < 1e-8
