"""Ops where tensors stand for others: nothing is computed to choose an implementation.

Not beside the other tests of ops, which poison what allocates: Inductor would keep what it imports.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrace.ops import tuning

X = torch.linspace(-1, 1, 8)


def test_a_tensor_that_is_not_there_is_never_computed_with():
    assert not tuning.is_occupied(X)
    with FakeTensorMode():
        assert tuning.is_occupied(torch.empty(3))
    seen = []

    def traced(x):
        seen.append(tuning.is_occupied(x))
        return x + 1

    torch.compile(traced, backend="eager", fullgraph=True)(X)
    assert seen[0] is True
