"""Rivals that several ops share. A rival that cannot run on a machine raises when called, and is reported."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Contender

SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def working_dtype() -> torch.dtype:
    """fp16 on a GPU; fp32 for toy shapes on a CPU, where half precision is coarse and slow."""
    return torch.float32 if torch.get_default_device().type == "cpu" else torch.float16


def sdpa_rivals(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> dict[str, Contender]:
    """Each backend of scaled_dot_product_attention, and xformers, on ``[B, M, H, d]`` tensors."""

    def backend(kind: SDPBackend) -> Contender:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                heads_first = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

        return run

    def xformers() -> Tensor:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)

    return {**{name: backend(kind) for name, kind in SDPA_BACKENDS.items()}, "xformers": xformers}


def compiled(function: Callable[..., Tensor], *arguments: object) -> Contender:
    """``function(*arguments)`` under ``torch.compile``, with its search over kernels on."""
    fast = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: fast(*arguments)
