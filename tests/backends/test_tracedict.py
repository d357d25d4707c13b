"""Edits in baukit's form mean the same as hooks and as patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.backends.tracedict import AddTo, Replace, Restore, TokenEdit, Zero, patches_of
from fasttrace.errors import BackendError
from tests.backends.language_models import VOCABULARY, language_model

LAYERS = ["transformer.h.0.mlp", "transformer.h.1", "transformer.h.2.attn"]
VECTOR = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def check(
    model: Any, body: Any, ids: torch.Tensor, noise: torch.Tensor, edit: TokenEdit, layers: list[str], tolerance: float
) -> None:
    """The edit as baukit's hook on rows ``[clean, corrupted]``, and as the patches of a run."""

    def corrupt(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.stack([output[0], output[1] + noise])

    handles = [model.get_input_embeddings().register_forward_hook(corrupt)]
    edited = [model.get_submodule(name) for name in layers]
    handles += [layer.register_forward_hook(lambda _, args, output: edit(output)) for layer in edited]
    try:
        with torch.no_grad():
            expected = body(input_ids=ids.repeat(2, 1)).last_hidden_state[1]
    finally:
        for handle in handles:
            handle.remove()
    trace = ft.trace_text(model, ids, [patches_of(layers, edit)], noise)
    scale = expected.abs().max().item()
    torch.testing.assert_close(trace.restored[0], expected, rtol=tolerance, atol=tolerance * scale)
    assert (trace.restored[0] - trace.corrupted).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("edit", [Restore([2, 5]), Zero([4]), Replace([1, 3], VECTOR), AddTo([6], VECTOR)])
@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS])
def test_an_edit_as_patches_equals_the_edit_as_a_hook(edit: TokenEdit, layers: list[str]) -> None:
    model = language_model("gpt2")
    ids = torch.randint(0, VOCABULARY, (8,), generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(8, 32, dtype=torch.float64)
    noise[2:4] = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(model, model.transformer, ids, noise, edit, layers, 1e-9)


@pytest.mark.parametrize("edit", [Restore, Zero, Replace, AddTo])
def test_an_edit_does_the_same_to_the_packaged_text_encoder(edit: type[TokenEdit]) -> None:
    pipe = ft.load_pipeline("emoji")
    ids = torch.tensor(pipe.tokenizer("a red penguin in flat style", padding="max_length").input_ids)
    width, layers = pipe.text_encoder.config.hidden_size, ["encoder.layers.0.mlp", "encoder.layers.2"]
    generator = torch.Generator().manual_seed(1)
    noise = torch.zeros(len(ids), width)
    noise[2:4] = torch.randn(2, width, generator=generator)
    value = (torch.randn(width, generator=generator),) if edit in (Replace, AddTo) else ()
    check(pipe.text_encoder, pipe.text_encoder, ids, noise, edit([3, 4], *value), layers, 1e-5)


def test_edits_may_differ_by_layer() -> None:
    patches = patches_of(LAYERS[:2], {LAYERS[0]: Zero([1]), LAYERS[1]: Restore([2])})
    assert [(p.site, p.positions, p.source) for p in patches] == [
        (LAYERS[0], (1,), ft.ZERO),
        (LAYERS[1], (2,), "clean"),
    ]


def test_any_other_callable_is_refused() -> None:
    with pytest.raises(BackendError, match="baukit's TraceDict"):
        patches_of("transformer.h.0", lambda output, layer: output)
    with pytest.raises(BackendError, match=r"no edit for layer 'transformer\.h\.1'"):
        patches_of(["transformer.h.0", "transformer.h.1"], {"transformer.h.0": Zero([1])})
