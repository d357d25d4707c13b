"""Muon: momentum whose update is orthogonalised, for matrices and convolutions; AdamW for everything else.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale that matches AdamW's update
size is that of Liu et al. 2025, "Muon is scalable for LLM training", so that one learning rate serves both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5, precision: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix to ``matrix`` [m, n], roughly, by Newton-Schulz in ``precision``."""
    a, b, c = _QUINTIC
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(precision)
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """One optimiser over all parameters: those of two or more dimensions by Muon, the rest by Adam.

    A group with ``"orthogonal": False`` goes to Adam whole: embedding tables, whose rows are updated apart.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        self.precision = precision
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "betas": betas, "orthogonal": True}
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._muon if parameter.ndim >= 2 and group["orthogonal"] else self._adam
                    update(parameter, parameter.grad, group, self.state[parameter])

    def _muon(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = orthogonalise(grad.lerp(state["momentum"], group["momentum"]).flatten(1), precision=self.precision)
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if not state:
            state |= {"mean": torch.zeros_like(grad), "square": torch.zeros_like(grad), "step": torch.zeros(())}
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - first)
        state["square"].lerp_(grad.square(), 1 - second)
        step = float(state["step"])
        size = group["lr"] / (1 - first**step)
        root = (state["square"] / (1 - second**step)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["mean"], root, value=-size)
