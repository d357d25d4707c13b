"""Hooks and wrappings of other libraries on the same model stay as they are, also after an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fasttrace as ft
from fasttrace.backends import rome
from fasttrace.errors import FasttraceError
from tests.backends.language_models import language_model

pv = pytest.importorskip("pyvene", reason="needs the backends extra: pip install 'fasttrace[backends]'")
nnsight = pytest.importorskip("nnsight", reason="needs the backends extra: pip install 'fasttrace[backends]'")

nnsight_backend = pytest.importorskip("fasttrace.backends.nnsight")
pyvene_backend = pytest.importorskip("fasttrace.backends.pyvene")

IDS = torch.arange(1, 8)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What others may have put on each module: its class, hooks by number, a ``forward`` of its own, parameters."""
    return {
        name: (
            type(module),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(module._backward_hooks),
            vars(module).get("forward"),
            [
                (key, one.data_ptr(), one._version, one.requires_grad)
                for key, one in module._parameters.items()
                if one is not None
            ],
        )
        for name, module in model.named_modules()
    }


@pytest.fixture
def crowded() -> Any:
    """A model that nnsight and pyvene have wrapped, with hooks of the user on its modules and parameters to train."""
    model = copy.deepcopy(language_model("gpt2", torch.float32)).requires_grad_(True)
    config = pv.IntervenableConfig(
        [{"layer": 1, "component": "mlp_output", "intervention_type": pv.VanillaIntervention}]
    )
    model.others = [nnsight.NNsight(model), pv.IntervenableModel(config, model)]
    model.requires_grad_(True)
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: None)
    model.transformer.h[2].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


def run_rome(model: Any, layer: int) -> None:
    rome.trace_with_patch(model, {"input_ids": IDS.repeat(3, 1)}, [(2, f"transformer.h.{layer}.mlp")], 3, (1, 3))


def run_pyvene(model: Any, layer: int) -> None:
    representation = {"layer": layer % 3, "component": "block_output", "intervention_type": pv.VanillaIntervention}
    fast = pyvene_backend.FastIntervenable(pv.IntervenableConfig([representation]), model)
    fast({"input_ids": IDS[None]}, [{"input_ids": IDS.flip(0)[None]}], {"sources->base": 3 if layer < 3 else 99})


def run_nnsight(model: Any, layer: int) -> None:
    envoy = model.others[0].transformer.h[layer % 3].mlp
    (patch,) = nnsight_backend.patches(model.others[0], [envoy], positions=[3 if layer < 3 else 99])
    ft.trace_text(model, IDS, [patch], torch.zeros(7, 32))


@pytest.mark.parametrize("run", [run_rome, run_pyvene, run_nnsight])
def test_a_model_is_left_as_it_was(crowded: Any, run: Callable[[Any, int], None]) -> None:
    before = state_of(crowded)
    run(crowded, 1)
    assert state_of(crowded) == before
    with pytest.raises(FasttraceError):
        run(crowded, 99)
    assert state_of(crowded) == before


def test_hooks_on_submodules_act_in_both(crowded: Any) -> None:
    """The user's hook on an MLP changes what an adapter returns as it changes what the model does."""
    with torch.no_grad():
        expected = torch.softmax(crowded(input_ids=IDS[None]).logits[0, -1], dim=-1)
        found = rome.trace_with_patch(crowded, {"input_ids": IDS.repeat(2, 1)}, [], torch.arange(9), None)
        torch.testing.assert_close(found, expected[:9], rtol=1e-5, atol=1e-7)
        without = torch.softmax(language_model("gpt2", torch.float32)(input_ids=IDS[None]).logits[0, -1], dim=-1)
    assert (found / without[:9] - 1).abs().max() > 0.05
