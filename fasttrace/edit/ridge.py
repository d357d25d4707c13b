"""The ridge problem behind every closed-form edit, solved as low-rank factors.

    min_W  Σ ‖W kᵢ − vᵢ‖² + λ ‖W − W₀‖² + tr((W − W₀) C (W − W₀)ᵀ)

has the solution ``W = W₀ + R Bᵀ`` with ``R = V − W₀ K`` and ``B = P K (I + Kᵀ P K)⁻¹``, ``P = (λ I + C)⁻¹``. Without
``C`` that is ``B = K (λ I + Kᵀ K)⁻¹``: an r × r system for r keys. Columns of ``R`` that are zero (keys to preserve)
drop out of the product, so only the edited keys set the rank of an update.

Keys are data in any float dtype; the solves run in float64 on the CPU, where they take milliseconds and do not depend
on the device that the model is on.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..errors import EditError

# Smallest pivot of a Cholesky factor, relative to its largest, at which keys still count as independent where λ = 0.
_INDEPENDENT = 1e-6


class Prior:
    """What holds a matrix back: ``λ I + C``. Its Cholesky factor is computed once and serves every fit.

    Args:
        ridge: ``λ``, > 0; 0 is allowed where the keys, or ``C``, make the problem unique.
        gram: ``C [d, d]``, symmetric and positive semidefinite: the sum of ``k kᵀ`` over keys that should keep their
            values. A float64 copy is taken.

    Raises:
        EditError: ``λ < 0`` or not finite; ``C`` not square, not symmetric or not finite.
    """

    def __init__(self, ridge: float, gram: Tensor | None = None) -> None:
        if not 0 <= ridge < float("inf"):
            raise EditError(f"ridge={ridge!r}: expected a number > 0 (0 only with independent keys)")
        self.ridge = float(ridge)
        self.gram = None if gram is None else _checked_gram(gram)

    def matrix(self, width: int) -> Tensor:
        """``λ I + C`` in float64."""
        held = self.ridge * torch.eye(width, dtype=torch.float64)
        if self.gram is None:
            return held
        if self.gram.shape[0] != width:
            raise EditError(f"gram is {self.gram.shape[0]} wide and the edited matrix takes {width} inputs")
        return held + self.gram

    def solve(self, keys: Tensor) -> Tensor:
        """``(λ I + C)⁻¹ keys`` by the cached factor; ``keys [d, r]`` in float64."""
        factor = self._factor
        if factor.shape[0] != keys.shape[0]:
            raise EditError(f"gram is {factor.shape[0]} wide and the edited matrix takes {keys.shape[0]} inputs")
        return torch.cholesky_solve(keys, factor)

    @cached_property
    def _factor(self) -> Tensor:
        assert self.gram is not None
        return _cholesky(self.matrix(self.gram.shape[0]), self.ridge)


def _checked_gram(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise EditError(f"gram has shape {list(gram.shape)}: expected [d, d], the sum of k kᵀ over keys to preserve")
    wide = gram.detach().to("cpu", torch.float64, copy=True)
    scale = float(wide.abs().max())
    if not torch.isfinite(wide).all() or float((wide - wide.T).abs().max()) > 1e-4 * scale:
        raise EditError("gram is not a finite symmetric matrix: expected the sum of k kᵀ over keys to preserve")
    return (wide + wide.T) / 2


def ridge_right(keys: Tensor, prior: Prior, keep: Tensor | None = None) -> Tensor:
    """``B``, the right factor of the update ``R Bᵀ``.

    Args:
        keys: ``[d, r]``, keys whose values change.
        prior: ``λ`` and ``C``.
        keep: ``[d, p]``, keys that should keep their values: pairs with ``v = W₀ k``.

    Returns:
        ``[d, r]`` float64 on the CPU. With more keys than inputs (r + p > d) the system that is solved is d × d.

    Raises:
        EditError: keys that are not finite, or ``λ = 0`` with dependent keys.
    """
    edited = _as_float64(keys)
    kept = edited[:, :0] if keep is None else _as_float64(keep)
    every = torch.cat([edited, kept], dim=1)
    width, count = every.shape
    if count > width:
        return _by_inputs(edited, every, prior)
    if prior.gram is None:
        system = every.T @ every + prior.ridge * torch.eye(count, dtype=torch.float64)
        lifted = every
    else:
        lifted = prior.solve(every)
        system = every.T @ lifted + torch.eye(count, dtype=torch.float64)
    factor = _cholesky(system, prior.ridge)
    selected = torch.eye(count, edited.shape[1], dtype=torch.float64)
    return lifted @ torch.cholesky_solve(selected, factor)


def ridge_path(keys: Tensor, ridges: list[float], keep: Tensor | None = None) -> list[Tensor]:
    """``ridge_right`` for many ``λ`` from one eigendecomposition of ``Kᵀ K``; no ``C``."""
    for ridge in ridges:
        if not ridge > 0:
            raise EditError(f"ridge={ridge!r}: expected a number > 0")
    edited = _as_float64(keys)
    every = edited if keep is None else torch.cat([edited, _as_float64(keep)], dim=1)
    values, vectors = torch.linalg.eigh(every.T @ every)
    lifted, selected = every @ vectors, vectors[: edited.shape[1]].T
    return [lifted @ (selected / (values.clamp_min(0) + ridge)[:, None]) for ridge in ridges]


def fold(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same update by at most d columns, where more keys than inputs were edited.

    Args:
        left: ``R [N, r]``.
        right: ``B [d, r]`` float64.
    """
    if right.shape[1] <= right.shape[0]:
        return left, right
    orthonormal, triangle = torch.linalg.qr(right.T)
    return left @ orthonormal.to(left), triangle.T.contiguous()


def reference(weight: Tensor, keys: Tensor, values: Tensor, ridge: float, gram: Tensor | None = None) -> Tensor:
    """``(λ W₀ + V Kᵀ + W₀ C)(λ I + K Kᵀ + C)⁻¹`` in float64, from the normal equations: what tests compare with."""
    w, k, v = (t.detach().to("cpu", torch.float64) for t in (weight, keys, values))
    held = Prior(ridge, gram).matrix(k.shape[0])
    return torch.linalg.solve(held + k @ k.T, (w @ held + v @ k.T).T).T


def _by_inputs(edited: Tensor, every: Tensor, prior: Prior) -> Tensor:
    """``(λ I + C + K Kᵀ)⁻¹ Kₑ``: the d × d form."""
    system = every @ every.T + prior.matrix(every.shape[0])
    return torch.cholesky_solve(edited, _cholesky(system, prior.ridge))


def _cholesky(system: Tensor, ridge: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    if int(failed) or (ridge == 0 and float(pivots.min()) < _INDEPENDENT * float(pivots.max())):
        raise EditError(
            f"ridge={ridge}: the {len(system)} x {len(system)} system is singular, because keys depend on each other; "
            "use a larger ridge, such as 0.01"
        )
    return factor


def _as_float64(keys: Tensor) -> Tensor:
    wide = keys.detach().to("cpu", torch.float64)
    if wide.ndim != 2 or not torch.isfinite(wide).all():
        raise EditError(f"keys of shape {list(keys.shape)} in {keys.dtype}: expected finite numbers [d, r]")
    return wide
