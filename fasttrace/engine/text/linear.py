"""How the packed engine calls a layer's linear modules: as they are, or in oneDNN's own weight layout for a long pass.

On a CPU a long pass wins twice from the second: the product itself is about 15% faster, and an MLP's activation is part
of it. Layers that carry hooks or adapters are called as modules all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.text.description import FeedForward

# Fewer rows a layer than this do not repay the reordering of its weights.
WORTHWHILE_ROWS = 2048
# x sigmoid(1.702 x) = swish(1.702 x) / 1.702: both factors go into the weights on either side.
_QUICK_GELU = 1.702
_FUSED = {
    "QuickGELUActivation": ("swish", "", _QUICK_GELU),
    "SiLUActivation": ("swish", "", 1.0),
    "GELUActivation": ("gelu", "none", 1.0),
    "GELUTanh": ("gelu", "tanh", 1.0),
    "NewGELUActivation": ("gelu", "tanh", 1.0),
    "ReLU": ("relu", "", 1.0),
}


def on_packed(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module on packed rows ``[R, D]`` in the three dimensions that it and its hooks are used to."""
    result: Tensor = module(x[None])
    return result[0]


class Modules:
    """Every module called as it is."""

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """``[R, K] -> [R, D]``."""
        return on_packed(module, x)

    def plus(self, module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        """The residual ``[R, D]`` plus the module's output."""
        return residual + on_packed(module, x)

    def feed_forward(self, mlp: FeedForward, x: Tensor, residual: Tensor) -> Tensor:
        """The residual plus the MLP's output."""
        return residual + on_packed(mlp.module, x)


class Reordered(Modules):
    """Plain linear modules in oneDNN's layout, kept for one pass."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, float, float], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._apply(module, x) if _is_plain(module) else super().__call__(module, x)

    def plus(self, module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        if not _is_plain(module):
            return super().plus(module, x, residual)
        return self._apply(module, x).add_(residual)

    def feed_forward(self, mlp: FeedForward, x: Tensor, residual: Tensor) -> Tensor:
        if mlp.parts is None or any(map(has_hooks, mlp.module.modules())):
            return super().feed_forward(mlp, x, residual)
        up, activation, down = mlp.parts
        fused = _FUSED.get(type(activation).__name__)
        if fused is None or not _is_plain(up) or not _is_plain(down):
            return super().feed_forward(mlp, x, residual)
        name, algorithm, factor = fused
        inner = self._apply(up, x, name, algorithm, factor, factor)
        # oneDNN can add the residual too, but with a bias that takes 4 ms more a call, whatever the size.
        return self._apply(down, inner, factor=1.0 / factor).add_(residual)

    def _apply(
        self,
        module: nn.Module,
        x: Tensor,
        name: str = "none",
        algorithm: str = "",
        factor: float = 1.0,
        bias_factor: float = 1.0,
    ) -> Tensor:
        weight, bias = self._weights(module, factor, bias_factor)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
        return result

    def _weights(self, module: nn.Module, factor: float, bias_factor: float) -> tuple[Tensor, Tensor | None]:
        key = id(module), factor, bias_factor
        if key not in self._kept:
            weight, bias = _weight_and_bias(module)
            reordered = torch.ops.mkldnn._reorder_linear_weight((weight * factor).contiguous(), WORTHWHILE_ROWS)
            self._kept[key] = reordered, None if bias is None else bias * bias_factor
        return self._kept[key]


def reordered_calls(like: Tensor, rows: int) -> Modules:
    """How to call linear modules on a CPU in a pass of ``rows`` rows a layer on tensors like ``like``."""
    usable = like.device.type == "cpu" and like.dtype in (torch.float32, torch.bfloat16)
    available = torch._C._has_mkldnn and torch.backends.mkldnn.enabled
    if usable and available and rows >= WORTHWHILE_ROWS and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return Reordered()
    return Modules()


def _is_plain(module: nn.Module) -> bool:
    # transformers' Conv1D is known by name, so that this file does not import transformers.
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return plain and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    # Conv1D keeps [in, out].
    return (weight if isinstance(module, nn.Linear) else weight.T).detach(), bias
