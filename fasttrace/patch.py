"""Patches: one overwrite of one site's value in one run."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from .errors import PatchError
from .sites import Site

ROLES = ("subject", "subject_first", "subject_last", "eos", "pad")
BRANCHES = ("cond", "uncond", "both")

Branch: TypeAlias = Literal["cond", "uncond", "both"]


class _Zero:
    """The source that overwrites with zeros; `ZERO` is its only instance."""

    def __repr__(self) -> str:
        return "ZERO"


ZERO: Final = _Zero()


@dataclass(frozen=True, eq=False)
class Add:
    """The source that adds a tensor to what was computed: ``[D]``, ``[P, D]``, or ``[C, h, w]`` for spatial sites."""

    value: Tensor


@dataclass(frozen=True)
class Noise:
    """The source that adds Gaussian noise to what was computed.

    The draw is that of `fasttrace.philox_normal` with noise sample 0: position ``p`` and channel ``c`` of the site's
    value always receive the same number, at every step and on every device. Sites of one run that should receive
    independent noise take different seeds.

    Args:
        sigma: standard deviation, >= 0.
        seed: key of the generator.

    Raises:
        PatchError: a sigma that is not a finite number >= 0.
    """

    sigma: float
    seed: int = 0

    def __post_init__(self) -> None:
        sigma: Any = self.sigma
        if not isinstance(sigma, Real) or not 0 <= float(sigma) < math.inf:
            raise PatchError(f"Noise(sigma={self.sigma!r}): expected a finite number >= 0")


Source: TypeAlias = str | _Zero | Tensor | Noise | Add


@dataclass(frozen=True, eq=False, init=False)
class Patch:
    """One overwrite: site, positions, steps, CFG branch, source.

    Args:
        site: a `Site` or its name.
        positions: ``None`` for all, ``[]`` for none, indices, or a role that a study resolves for each prompt
            (``"subject"``, ``"subject_first"``, ``"subject_last"``, ``"eos"``, ``"pad"``). Positions are tokens in text
            encoders; in the UNet they are pixels of the feature map in row-major order.
        steps: denoising steps, as indices into ``scheduler.timesteps``: ``None`` for all, ``[]`` for none, indices or a
            range. A text encoder runs once, so its patches take ``None`` or ``[]`` only.
        branch: ``"cond"``, ``"uncond"`` or ``"both"`` of classifier-free guidance. Each branch copies from the same
            branch of the source run.
        source: ``"clean"``, ``"corrupted"``, a key of the trace's ``sources``, `ZERO`, a tensor to overwrite with
            (``[D]``, ``[P, D]``, or ``[C, h, w]`` for spatial sites), `Noise` or `Add`.

    Raises:
        PatchError: an unknown role or branch, positions or steps that are no whole numbers (a mask of booleans, say),
            or a source of another type.
    """

    site: str
    positions: tuple[int, ...] | str | None
    steps: tuple[int, ...] | None
    branch: Branch
    source: Source

    def __init__(
        self,
        site: Site | str,
        positions: str | Iterable[int] | None = None,
        steps: Iterable[int] | None = None,
        branch: Branch = "cond",
        source: Source = "clean",
    ) -> None:
        if isinstance(positions, str) and positions not in ROLES:
            raise PatchError(f"positions={positions!r}: expected None, indices, or one of {', '.join(ROLES)}")
        if branch not in BRANCHES:
            raise PatchError(f"branch={branch!r}: expected one of {', '.join(BRANCHES)}")
        if not isinstance(source, str | _Zero | Tensor | Noise | Add):
            raise PatchError(
                f'source={source!r}: expected "clean", "corrupted", a key of sources=, ZERO, a tensor, Noise(...) or '
                "Add(...)"
            )
        fixed = {
            "site": site.name if isinstance(site, Site) else str(site),
            "positions": positions
            if positions is None or isinstance(positions, str)
            else _indices(positions, "positions"),
            "steps": None if steps is None else _indices(steps, "steps"),
            "branch": branch,
            "source": source,
        }
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    def within(self, positions: int, steps: int | None, known_sources: Iterable[str]) -> None:
        """Check the patch against a trace.

        Args:
            positions: number of positions of the site's value.
            steps: number of denoising steps, or ``None`` where the patched forward runs only once.
            known_sources: names that ``source`` may take.

        Raises:
            PatchError: an unresolved role, an index out of range, or an unknown source.
        """
        if isinstance(self.positions, str):
            raise PatchError(
                f"{self.site}: positions={self.positions!r} is a role, which only a Study can resolve: give indices"
            )
        _check_range(self.site, "position", self.positions or (), positions)
        if steps is not None:
            _check_range(self.site, "step", self.steps or (), steps)
        elif self.steps:
            raise PatchError(
                f"{self.site}: steps={list(self.steps)}, but a text encoder runs once, before denoising: use steps=None"
            )
        if isinstance(self.source, str) and self.source not in known_sources:
            names = ", ".join(sorted(known_sources))
            raise PatchError(f"{self.site}: source={self.source!r} is not among the sources of this trace: {names}")

    @property
    def is_empty(self) -> bool:
        """Whether the patch names no position or no step, so that the run equals its base."""
        return self.positions == () or self.steps == ()


PatchSet: TypeAlias = Patch | Sequence[Patch]
"""What one run carries: a patch, or several."""


def as_runs(patches: Iterable[PatchSet]) -> list[tuple[Patch, ...]]:
    """One tuple of patches for each run.

    Raises:
        PatchError: an element is neither a `Patch` nor a sequence of them.
    """
    if isinstance(patches, Patch):
        raise PatchError(f"patches={patches!r} is a single Patch: expected a list, with one element for each run")
    runs: list[tuple[Patch, ...]] = []
    for index, run in enumerate(patches):
        members = (run,) if isinstance(run, Patch) or not isinstance(run, Iterable) else tuple(run)
        for patch in members:
            if not isinstance(patch, Patch):
                raise PatchError(f"patches[{index}] contains {patch!r}: expected a Patch or a tuple of Patches")
        runs.append(members)
    return runs


def _indices(values: Iterable[int], what: str) -> tuple[int, ...]:
    try:
        return tuple(_index(value) for value in values)
    except TypeError as error:
        raise PatchError(
            f"{what}={values!r}: expected None or integers; of a mask of booleans give the indices that are True"
        ) from error


def _index(value: Any) -> int:
    """The value itself; a float would be cut off silently, and a mask read as the indices 0 and 1."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"{value!r} is a truth value")
    return operator.index(value)


def _check_range(site: str, what: str, values: Sequence[int], count: int) -> None:
    outside = [value for value in values if not 0 <= value < count]
    if outside:
        raise PatchError(f"{site}: {what} {outside[0]} is out of range: expected 0 to {count - 1}")
