"""Counting floating-point operations as they run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's counter, which knows every attention operator but the CPU's."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention})


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of shapes ``[B, H, T, D]``: two products, masked or not."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
