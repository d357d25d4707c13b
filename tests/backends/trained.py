"""A tiny GPT-2 that has learnt twelve facts, so that a trace of it has something to find."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

FACTS, LENGTH, SUBJECT = 12, 7, 3
_VALUES, _FILLER, _QUESTION = 16, 32, 63


def prompts(keys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[n, T]``: random words, the key at position ``SUBJECT``, random words, and a question at the end."""
    ids = torch.randint(_FILLER, _QUESTION, (len(keys), LENGTH), generator=generator)
    ids[:, SUBJECT] = keys
    ids[:, -1] = _QUESTION
    return ids


def answers(keys: torch.Tensor) -> torch.Tensor:
    """The value of each key, whatever the other words."""
    return _VALUES + keys * 5 % FACTS


def train(model: Any) -> Any:
    """Teach a model the facts, in about two seconds on one core."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        keys = torch.randint(0, FACTS, (48,), generator=generator)
        loss = cross_entropy(model(input_ids=prompts(keys, generator)).logits[:, -1], answers(keys))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
