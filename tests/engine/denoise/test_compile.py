"""The compiled graph: equal to the oracle, one for all mixes of patches, unbroken."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.engine.denoise import compile as unet_compile
from fasttrace.engine.denoise import packed_products as unet_packed
from tests.engine import denoiser_cases
from tests.engine.unet_cases import both, difference, unet_sites


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs, which are traced whole but left to eager kernels: that takes seconds."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any, mode: str = "default") -> Any:
        graph.mode = mode
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(unet_compile.torch, "compile", functools.partial(torch.compile, backend=keep, fullgraph=True))
    return graphs


def test_one_graph_for_every_mix_of_patches(traced: list[Any]) -> None:
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


def test_given_tensors_and_several_maps(traced: list[Any]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    sites = unet_sites(pipe)
    mix = [
        ft.Patch(sites[0], source=ft.Noise(0.5, 1)),
        (ft.Patch(sites[3]), ft.Patch(sites[3], positions=[0, 5], source=ft.Add(torch.ones(16, dtype=torch.float64)))),
        ft.Patch("unet.mid_block.attentions.0", steps=[1, 2]),
    ]
    assert difference(*both(pipe, mix, compile=True, max_batch=8)) < 1e-8
    assert traced


def test_products_are_on_packed_weights_that_follow_edits(traced: list[Any]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    mix = [ft.Patch(site) for site in unet_sites(pipe)[:4]]
    for factor in (1.0, 1.5):
        pipe.unet.mid_block.resnets[0].conv1.weight.data.mul_(factor)
        pipe.unet.mid_block.attentions[0].proj_in.weight.data.mul_(factor)
        assert difference(*both(pipe, mix, compile=True, num_inference_steps=2)) < 1e-4
    targets = [str(node.target) for graph in traced for node in graph.graph.nodes]
    assert len(traced) <= 2
    assert "fasttrace.packed_convolution.default" in targets
    assert "fasttrace.packed_linear.default" in targets
    assert not any("conv2d" in target or "function linear" in target for target in targets)


def test_no_second_set_of_weights_outlives_a_trace(traced: list[Any]) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    before = len(unet_packed._packed)
    both(pipe, [ft.Patch(unet_sites(pipe)[3])], compile=True, num_inference_steps=2)
    assert len(traced) == 1
    assert len(unet_packed._packed) == before


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_capture_cuda_graphs_see_one_graph_too(traced: list[Any], mode: str) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    for sites in (unet_sites(pipe)[:2], unet_sites(pipe)[7:9]):
        mix = [ft.Patch(site) for site in sites]
        assert difference(*both(pipe, mix, compile=mode, num_inference_steps=2)) < 1e-8
    assert [graph.mode for graph in traced] == [mode]


def test_an_unknown_mode_is_refused(tiny_sd15: Any) -> None:
    with pytest.raises(ft.FasttraceError, match=r"compile='fastest'.*reduce-overhead"):
        both(tiny_sd15, [], compile="fastest")


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_every_architecture(tiny: Any, traced: list[Any], protocol: str) -> None:
    mix = [ft.Patch(site) for site in unet_sites(tiny)[::4]]
    oracle, fast = both(tiny, mix, compile=True, protocol=protocol, num_inference_steps=2)
    torch.testing.assert_close(fast.restored, oracle.restored, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_with_torchs_own_compiler() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    assert difference(*both(pipe, [ft.Patch(site) for site in unet_sites(pipe)[:2]], compile=True)) < 1e-8


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-sd35", "tiny-flux", "tiny-pixart"])
def test_transformers_heads_and_modulations(name: str, traced: list[Any]) -> None:
    pipe = ft.zoo.random_pipeline(name, dtype=torch.float64)
    names = denoiser_cases.site_names(pipe)
    head = next(site for site in names if site.endswith(".heads.1"))
    several = (ft.Patch(head, positions=[1]), ft.Patch(names[1], source=ft.Noise(0.5, 1)))
    mixes: list[list[Any]] = [[*map(ft.Patch, names[:4]), several], [*map(ft.Patch, names[4:8]), ft.Patch(head)]]
    for mix in mixes:
        compiled = denoiser_cases.both(pipe, mix, compile=True, max_batch=16, num_inference_steps=2)
        assert difference(*compiled) < 1e-8
    assert len(traced) <= 2
