"""baukit's ``TraceDict(module, layers, edit_output=...)``, for edits that say what they do.

An arbitrary ``edit_output`` is Python, and cannot be batched. The edits below are callables with baukit's signature, so
a script that uses them runs in baukit's ``TraceDict`` as well; here `patches_of` reads what they mean.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..patch import ZERO, Add, Patch, Source


@dataclass(frozen=True)
class TokenEdit(abc.ABC):
    """What all edits share: the tokens, of every row but the first, which is the clean run as in ROME.

    Attributes:
        tokens: positions that are edited.
    """

    tokens: Sequence[int]

    @abc.abstractmethod
    def source(self) -> Source:
        """The edit as the source of a patch."""

    @abc.abstractmethod
    def edited(self, hidden: Tensor) -> Tensor:
        """New values ``[B - 1, n, D]`` of the edited tokens, from the layer's output ``[B, T, D]``."""

    def __call__(self, output: Any, layer: str | None = None) -> Any:
        """baukit's ``edit_output``: edits in place, as ROME's own does."""
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[1:, list(self.tokens)] = self.edited(hidden)
        return output


@dataclass(frozen=True)
class Restore(TokenEdit):
    """Copy the clean row's values: ROME's restoration."""

    def source(self) -> Source:
        return "clean"

    def edited(self, hidden: Tensor) -> Tensor:
        return hidden[:1, list(self.tokens)].expand(len(hidden) - 1, -1, -1)


@dataclass(frozen=True)
class Zero(TokenEdit):
    """Write zeros."""

    def source(self) -> Source:
        return ZERO

    def edited(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden[1:, list(self.tokens)])


@dataclass(frozen=True)
class Replace(TokenEdit):
    """Write a vector ``[D]``."""

    value: Tensor

    def source(self) -> Source:
        return self.value

    def edited(self, hidden: Tensor) -> Tensor:
        return self.value.to(hidden).expand(len(hidden) - 1, len(self.tokens), -1)


@dataclass(frozen=True)
class AddTo(TokenEdit):
    """Add a vector ``[D]``."""

    value: Tensor

    def source(self) -> Source:
        return Add(self.value)

    def edited(self, hidden: Tensor) -> Tensor:
        return hidden[1:, list(self.tokens)] + self.value.to(hidden)


Edit = TokenEdit | Callable[..., Any]


def patches_of(layers: Sequence[str] | str, edit_output: Edit | Mapping[str, Edit]) -> tuple[Patch, ...]:
    """The patches of one run that ``TraceDict(model, layers, edit_output=edit_output)`` would make.

    Args:
        layers: layer names, as baukit takes them.
        edit_output: one of this module's edits for every layer, or one for each layer by name.

    Raises:
        BackendError: an edit that is some other callable, or a layer without one.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    patches = []
    for name in names:
        edit = edit_output.get(name) if isinstance(edit_output, Mapping) else edit_output
        if edit is None:
            raise BackendError(f"edit_output has no edit for layer {name!r}: give one, or leave the layer out")
        if not isinstance(edit, TokenEdit):
            raise BackendError(
                f"edit_output of {name!r} is {edit!r}, whose effect cannot be known: use Restore, Zero, Replace or "
                "AddTo of fasttrace.backends.tracedict, or run it in baukit's TraceDict"
            )
        patches.append(Patch(name, list(edit.tokens), source=edit.source()))
    return tuple(patches)
