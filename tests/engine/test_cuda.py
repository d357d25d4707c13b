"""The engines on a GPU equal the oracle on the same GPU; the same tests on a CPU prove the tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fasttrace as ft
from tests.engine.text_models import EOS, LENGTH, text_model
from tests.engine.unet_cases import both, difference, positions_of, unet_sites
from tests.pipelines import TINY, tiny_pipeline

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOUND = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1}
RUNS = 6


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Convolutions do not round their factors to ten bits; products do not by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on(device: str, name: str, dtype: torch.dtype) -> Any:
    pipe = tiny_pipeline(name, dtype)
    return pipe if device == "cpu" else copy.deepcopy(pipe).to(device)


def patches(pipe: Any) -> list[Any]:
    """Runs of one or two patches: whole sites and positions, every named source and zero, some steps or all."""
    draw = random.Random(0)
    found = []
    for _ in range(RUNS):
        run = []
        for site in draw.sample(unet_sites(pipe), draw.choice((1, 2))):
            some = sorted(draw.sample(range(positions_of(pipe, site)), 2))
            run.append(
                ft.Patch(
                    site,
                    draw.choice((None, some)),
                    draw.choice((None, [1])),
                    draw.choice(("cond", "both")),
                    draw.choice(("clean", "corrupted", "other", ft.ZERO)),
                )
            )
        found.append(tuple(run))
    return found


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_trace_equals_the_oracle(device, dtype, name, protocol):
    pipe = on(device, name, dtype)
    assert difference(*both(pipe, patches(pipe), protocol=protocol)) < BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_half_precision_stays_near_the_oracle(name):
    pipe = on("cuda", name, torch.float16)
    assert difference(*both(pipe, patches(pipe))) < BOUND[torch.float16]


@pytest.mark.parametrize("device", DEVICES)
def test_a_text_sweep_equals_the_oracle(device):
    model = copy.deepcopy(text_model("clip")).to(device)
    ids = torch.arange(1, LENGTH + 1)
    ids[-1] = EOS
    noise = torch.randn(2, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(4)).double()
    noise[:, [0, 1, *range(4, LENGTH)]] = 0
    cells = [ft.Patch(site.name, [token]) for site in ft.discover_sites(model) for token in range(1, LENGTH, 3)]
    fast, oracle = (ft.trace_text(model, ids, cells, noise, engine=engine) for engine in ("fast", "oracle"))
    scale = float(oracle.clean.abs().max())
    for name in ("clean", "corrupted", "restored"):
        assert float((getattr(fast, name) - getattr(oracle, name)).abs().max()) < 1e-10 * scale
