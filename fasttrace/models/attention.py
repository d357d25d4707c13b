"""diffusers' ``Attention`` modules taken apart: queries, keys and values, softmax, and what makes a module plain."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

FEW_SCORES = 64 * 64
"""Of one head; more are left to torch's own attention."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain_attention(attention: Any) -> bool:
    """Whether an attention module is softmax attention between four linear layers, and nothing more.

    Any other (xFormers' processor, say) is called as a module.
    """
    return (
        type(attention.processor).__name__ == "AttnProcessor2_0"
        and not any(has_hooks(module) for module in (attention, attention.to_k, attention.to_v))
        and all(
            getattr(attention, name, None) is None
            for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
        )
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of ``[B, H, P, d]`` to ``[B, H, T, d]``.

    On a CPU a matrix of few scores stays in the cache, and two products are up to twice as fast as the kernel that is
    made to never hold them.
    """
    scores = query.shape[2] * key.shape[2]
    if query.device.type != "cpu" or scores > FEW_SCORES:
        return scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
    return weights @ value


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, P, H * d]`` as ``[B, H, P, d]``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)
