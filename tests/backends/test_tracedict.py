"""Edits in baukit's form mean the same as hooks and as patches."""

from __future__ import annotations

import pytest
import torch

import fasttrace as ft
from fasttrace.backends.tracedict import AddTo, Replace, Restore, TokenEdit, Zero, patches_of
from fasttrace.errors import BackendError
from tests.backends.language_models import VOCABULARY, language_model

LAYERS = ["transformer.h.0.mlp", "transformer.h.1", "transformer.h.2.attn"]
VECTOR = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("edit", [Restore([2, 5]), Zero([4]), Replace([1, 3], VECTOR), AddTo([6], VECTOR)])
@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS])
def test_an_edit_as_patches_equals_the_edit_as_a_hook(edit: TokenEdit, layers: list[str]) -> None:
    model = language_model("gpt2")
    ids = torch.randint(0, VOCABULARY, (8,), generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(8, 32, dtype=torch.float64)
    noise[2:4] = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def corrupt(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.stack([output[0], output[1] + noise])

    handles = [model.transformer.wte.register_forward_hook(corrupt)]
    edited = [model.get_submodule(name) for name in layers]
    handles += [layer.register_forward_hook(lambda _, args, output: edit(output)) for layer in edited]
    try:
        with torch.no_grad():
            expected = model.transformer(input_ids=ids.repeat(2, 1)).last_hidden_state[1]
    finally:
        for handle in handles:
            handle.remove()
    trace = ft.trace_text(model, ids, [patches_of(layers, edit)], noise)
    torch.testing.assert_close(trace.restored[0], expected, rtol=1e-9, atol=1e-9)
    assert (trace.restored[0] - trace.corrupted).abs().max() > 1e-3


def test_edits_may_differ_by_layer() -> None:
    patches = patches_of(LAYERS[:2], {LAYERS[0]: Zero([1]), LAYERS[1]: Restore([2])})
    assert [(p.site, p.positions, p.source) for p in patches] == [
        (LAYERS[0], (1,), ft.ZERO),
        (LAYERS[1], (2,), "clean"),
    ]


def test_any_other_callable_is_refused() -> None:
    with pytest.raises(BackendError, match="baukit's TraceDict"):
        patches_of("transformer.h.0", lambda output, layer: output)
