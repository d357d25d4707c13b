"""The example of a backend in CONTRIBUTING.md is complete, and right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrace.errors import BackendError
from tests.backends.language_models import VOCABULARY, language_model

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


def test_the_example_equals_plain_hooks(example: dict[str, Any]) -> None:
    model = language_model("llama")
    ids = torch.randint(0, VOCABULARY, (8,), generator=torch.Generator().manual_seed(1))
    parts = ("self_attn", "mlp", "self_attn.heads.2")
    cells = [(layer, part, token) for layer in range(3) for part in parts for token in (0, 4, 7)]
    found = example["KnockoutBackend"](model, batch_size=7).run(example["Knockout"](ids, cells, answer=17))

    expected = []
    for layer, part, token in cells:

        def zero(module: Any, args: Any, output: Any, token: int = token) -> None:
            (output[0] if isinstance(output, tuple) else output)[:, token] = 0

        def zero_head(module: Any, args: Any, token: int = token) -> None:
            args[0][:, token, 16:24] = 0

        block = model.model.layers[layer]
        if part.endswith("heads.2"):
            handle = block.self_attn.o_proj.register_forward_pre_hook(zero_head)
        else:
            handle = getattr(block, part).register_forward_hook(zero)
        with torch.no_grad():
            expected.append(model(input_ids=ids[None]).logits[0, -1, 17])
        handle.remove()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert torch.stack(expected).std() > 1e-3


def test_a_batch_of_nothing_is_refused(example: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="batch_size=0"):
        example["KnockoutBackend"](language_model("llama"), batch_size=0)


def test_a_model_without_a_head_has_no_logits(example: dict[str, Any]) -> None:
    body = example["KnockoutBackend"](language_model("llama").model)
    with pytest.raises(BackendError, match="ForCausalLM"):
        body.logits(torch.zeros(1, 32))
