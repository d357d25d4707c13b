"""A backend holds no more than it says, however many cells a sweep has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttrace.backends import base, rome
from tests.backends.language_models import VOCABULARY, language_model
from tests.backends.memory import most_bytes

LENGTH, LAYERS = 24, 3
IDS = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(0))


def rome_sweep(model: Any, batch_size: int | None, times: int) -> None:
    names = [f"transformer.h.{layer}{part}" for layer in range(LAYERS) for part in ("", ".mlp", ".attn")]
    cells = [[(token, name)] for name in names for token in range(LENGTH)] * times
    rome.trace_many(model, {"input_ids": IDS.repeat(3, 1)}, cells, 5, (2, 5), 0.5, batch_size=batch_size)


def pyvene_sweep(model: Any, batch_size: int | None, times: int) -> None:
    pv = pytest.importorskip("pyvene", reason="needs the backends extra: pip install 'fasttrace[backends]'")
    from fasttrace.backends.pyvene import intervene_many

    def config(kind: str, layer: int) -> Any:
        return pv.IntervenableConfig([{"layer": layer, "component": kind, "intervention_type": pv.VanillaIntervention}])

    cells = [
        (config(kind, layer), {"sources->base": token})
        for kind in ("block_output", "mlp_output")
        for layer in range(LAYERS)
        for token in range(LENGTH)
    ] * times
    prompts = {"input_ids": IDS[None]}, [{"input_ids": IDS.flip(0)[None]}]
    for _ in intervene_many(model, cells, *prompts, logit_positions=[-1], batch_size=batch_size):
        pass


@pytest.mark.parametrize("sweep", [rome_sweep, pyvene_sweep])
def test_a_longer_sweep_takes_no_more_memory(sweep: Callable[[Any, int | None, int], None]) -> None:
    model = language_model("gpt2", torch.float32)
    once, thrice = (most_bytes(lambda times=times: sweep(model, 16, times)) for times in (1, 3))
    assert thrice < 1.2 * once
    assert most_bytes(lambda: sweep(model, 10_000, 1)) > 2 * once, "unless it is allowed to"


@pytest.mark.parametrize("sweep", [rome_sweep, pyvene_sweep])
def test_the_budget_is_kept_and_used(
    sweep: Callable[[Any, int | None, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("gpt2", torch.float32)
    budget = 2**20
    monkeypatch.setattr(base, "RUNS_BUDGET", 3 * budget // 4)
    monkeypatch.setattr(base, "LOGITS_BUDGET", budget // 4)
    unpatched = 3 * LENGTH * LAYERS * 9 * 32 * 4
    most = most_bytes(lambda: sweep(model, None, 2))
    assert budget / 8 < most < budget + unpatched
