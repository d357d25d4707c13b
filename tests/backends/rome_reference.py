"""ROME's ``trace_with_patch`` as its authors' paper and interface describe it: one hooked forward a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Noise = float | Callable[[torch.Tensor], torch.Tensor]


def trace_one_cell(
    model: Any,
    ids: torch.Tensor,
    states: Sequence[tuple[int, str]],
    answers: torch.Tensor,
    span: tuple[int, int] | None,
    *,
    samples: int = 3,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row 0 clean, the others corrupted and restored from row 0, in one forward; probabilities of ``answers``."""
    generator = np.random.RandomState(1)

    def corrupt(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if span is None:
            return output
        begin, end = span
        shape = (samples, end - begin, output.shape[-1])
        draws = torch.from_numpy(generator.uniform(-1, 1, shape) if uniform_noise else generator.randn(*shape))
        draws = noise(draws) if callable(noise) else noise * draws
        output = output.clone()
        output[1:, begin:end] = draws.to(output) if replace else output[1:, begin:end] + draws.to(output)
        return output

    def restore(tokens: list[int]) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            for token in tokens:
                hidden[1:, token] = hidden[0, token]
            return output

        return hook

    by_layer: dict[str, list[int]] = {}
    for token, name in states:
        by_layer.setdefault(name, []).append(token)
    modules = dict(model.named_modules())
    handles = [model.get_input_embeddings().register_forward_hook(corrupt)]
    handles += [modules[name].register_forward_hook(restore(tokens)) for name, tokens in by_layer.items()]
    try:
        with torch.no_grad():
            rows = samples + 1
            padding = None if mask is None else mask.repeat(rows, 1)
            logits = model(input_ids=ids.repeat(rows, 1), attention_mask=padding).logits
    finally:
        for handle in handles:
            handle.remove()
    return torch.softmax(logits[1:, -1], dim=-1).mean(0)[answers]
