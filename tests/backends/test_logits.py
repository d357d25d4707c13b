"""Logits and probabilities in parts, equal to those of the head called on everything at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fasttrace.backends import Backend, base, rome
from fasttrace.engine.text import linear
from fasttrace.errors import BackendError
from tests.backends.language_models import VOCABULARY, language_model
from tests.engine.text_models import text_model


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend[Any]:
    """On a model whose head has a bias or none; a hundred rows are a long pass, with its own layout of weights."""
    monkeypatch.setattr(linear, "WORTHWHILE_ROWS", 100)
    model = copy.deepcopy(language_model("gpt2", torch.float32))
    if request.param:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    return rome.RomeBackend(model)


@pytest.mark.parametrize("shape", [(0, 3, 32), (1, 32), (7, 32), (150, 32), (5, 2, 3, 32), (41, 1, 5, 32)], ids=str)
@pytest.mark.parametrize("rows", [0.5, 3, 16, 10_000])
@torch.no_grad()
def test_logits_of_each_are_the_heads(
    backend: Backend[Any], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rows: float
) -> None:
    monkeypatch.setattr(base, "LOGITS_BUDGET", int(4 * VOCABULARY * rows))
    states = torch.randn(shape)
    expected = backend.model.lm_head(states)
    found = list(backend.logits_of_each(states))
    assert len(found) == len(states)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backend.logits(states), expected, rtol=1e-5, atol=1e-5)
    answers = torch.tensor([3, 7, 3])
    torch.testing.assert_close(backend.logits(states, answers), expected[..., answers], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_probabilities_never_need_all_rows_logits(backend: Backend[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    states, answers = torch.randn(2, 50, 32), torch.tensor([3, 7])
    expected = torch.softmax(backend.model.lm_head(states), dim=-1)[..., answers]
    rows: list[int] = []
    monkeypatch.setattr(base, "LOGITS_BUDGET", 4 * VOCABULARY * 9)
    torch.testing.assert_close(backend.probabilities(states, answers), expected, rtol=1e-5, atol=0)
    # A hook, and with it the head is called as a module.
    backend.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    torch.testing.assert_close(backend.probabilities(states, answers), expected, rtol=1e-5, atol=0)
    assert (max(rows), sum(rows)) == (9, 100)


def test_a_model_without_a_head_has_neither() -> None:
    backend: Backend[Any] = rome.RomeBackend(text_model("clip"))
    for call in (backend.logits, lambda states: list(backend.logits_of_each(states))):
        with pytest.raises(BackendError, match="ForCausalLM"):
            call(torch.zeros(2, 3, 32))
