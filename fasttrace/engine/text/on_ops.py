"""Linear modules of the packed engine on ops, for a GPU: a product with what follows it in the same pass.

An output projection adds the residual itself (`linear_restore`), an MLP's way up applies its activation (`quick_gelu`,
`gelu_up`). Layers that carry hooks or adapters, or are of another class, are called as modules, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...models.text.description import FeedForward
from ...ops.gelu_up import gelu_up
from ...ops.linear_restore import linear_restore
from ...ops.quick_gelu import quick_gelu
from ...ops.restore import keep_all
from ...ops.selection import runs_on_ops
from .linear import Modules, has_hooks, reordered_calls

_ACTIVATED: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "QuickGELUActivation": lambda x, up: quick_gelu(x, up.weight, up.bias),
    "GELUActivation": lambda x, up: gelu_up(x, up.weight, up.bias),
    "GELUTanh": lambda x, up: gelu_up(x, up.weight, up.bias, None, True),
    "NewGELUActivation": lambda x, up: gelu_up(x, up.weight, up.bias, None, True),
}


class OnOps(Modules):
    """Plain linear modules on ops."""

    def plus(self, module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        if not _is_linear(module):
            return super().plus(module, x, residual)
        return _added(module, x[None], residual)

    def feed_forward(self, mlp: FeedForward, x: Tensor, residual: Tensor) -> Tensor:
        if mlp.parts is None or any(map(has_hooks, mlp.module.modules())):
            return super().feed_forward(mlp, x, residual)
        up, activation, down = mlp.parts
        activated = _ACTIVATED.get(type(activation).__name__)
        if activated is None or not (_is_linear(up) and _is_linear(down)):
            return super().feed_forward(mlp, x, residual)
        assert isinstance(up, nn.Linear)
        return _added(down, activated(x[None], up), residual)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not has_hooks(module)


def _added(module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """The residual ``[R, D]`` plus a linear module of ``x [1, R, K]``."""
    added: Tensor = linear_restore(x, module.weight, module.bias, residual[None], keep_all(x))
    return added[0]


def linear_calls(like: Tensor, rows: int) -> Modules:
    """How to call linear modules in a pass of ``rows`` rows a layer on tensors like ``like``."""
    return OnOps() if runs_on_ops(like.device) else reordered_calls(like, rows)
