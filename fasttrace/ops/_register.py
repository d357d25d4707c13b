"""How an op is registered, and how its implementation is chosen.

An ``Op`` is called directly by the engines, which costs no trip through torch's dispatcher. The same op is registered
as ``torch.ops.fasttrace.<name>`` with its reference on the CPU, the chosen implementation on CUDA and a fake, so that
``torch.compile`` and CUDA graphs keep it whole.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from . import tuning
from .selection import first_guess, known, override

_library: Any = torch.library.Library("fasttrace", "FRAGMENT")  # type: ignore[no-untyped-call]

Implementation = Callable[..., Any]


class ImplementationError(KernelError):
    """One implementation cannot serve a call that another can: it is not there, does not build, or refuses a layout.

    Attributes:
        lasting: no later call of this process will fare better.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


def triton_launcher(name: str, folder: str | None = None) -> Implementation:
    """Launcher ``name`` of ``kernels/<folder>`` (by default of that name), imported at its first call.

    Raises:
        ImplementationError: at the call, if Triton cannot be imported, the operands are on a CPU and Triton does not
            interpret, the kernel does not build, or the launcher refuses its arguments (``ValueError``).
    """

    @cache
    def load() -> Implementation:
        try:
            module = importlib.import_module(f"fasttrace.kernels.{folder or name}.launch")
        except ImportError as error:
            raise ImplementationError(
                f"{name}: the Triton kernel cannot be imported ({error}); pip install 'fasttrace[triton]', "
                f"or set FASTTRACE_IMPL={name}=torch",
                lasting=True,
            ) from error
        launcher: Implementation = getattr(module, name)
        return launcher

    def launch(*args: Any, **kwargs: Any) -> Any:
        launcher = load()
        if architecture(args[0]) is None and os.environ.get("TRITON_INTERPRET") != "1":
            raise ImplementationError(
                f"{name}: Triton kernels need an NVIDIA GPU and the operands are on the CPU; move them, choose "
                f"implementation='torch', or start Python with TRITON_INTERPRET=1 to interpret the kernel, slowly"
            )
        try:
            return launcher(*args, **kwargs)
        except ValueError as error:
            raise ImplementationError(f"{name}: {error}, or choose another implementation of the op") from error
        except Exception as error:
            if not type(error).__module__.startswith("triton"):
                raise
            raise ImplementationError(
                f"{name}: the Triton kernel does not build here ({_first_line(error)}); choose another implementation",
                lasting=True,
            ) from error

    return launch


class Op:
    """One op: a plain reference and implementations that are held equal to it.

    Args:
        schema: arguments and result in ``torch.library``'s notation, without the name: ``"(Tensor x) -> Tensor"``.
        reference: the truth, in plain PyTorch, for any float dtype, float64 included.
        fake: result's shape and dtype from the arguments' alone.
        implementations: ``{name: callable}``, each with the reference's arguments. ``"reference"`` is added.
        shape_class: class of a call's shapes, from its arguments; the key of the selection table.
        safe: implementation where none was measured, on a CPU, and where another one cannot serve a call.
        writes: number of the argument that receives the results of an op that returns nothing.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Implementation,
        fake: Implementation,
        implementations: Mapping[str, Implementation],
        shape_class: Callable[..., str],
        safe: str = "torch",
        writes: int | None = None,
    ) -> None:
        self.name = name
        self.implementations: Mapping[str, Implementation] = {"reference": reference, **implementations}
        self.shape_class = shape_class
        self.safe = known(name, safe, self.implementations)
        self.writes = writes
        self.dropped: set[str] = set()
        _library.define(name + schema)
        _library.impl(name, reference, "CPU")
        _library.impl(name, self, "CUDA")
        torch.library.register_fake(f"fasttrace::{name}", fake, lib=_library)

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Run the op. ``implementation`` overrides the choice, and is an error where the op has no such one.

        The first argument, an operand, is given by position. What a caller or ``FASTTRACE_IMPL`` asked for runs or
        raises. Where the op itself chose an implementation that cannot serve the call, it says so once, and the safe
        one serves it. Tensors on the meta device go through the dispatcher, so that who counts operators sees one.
        """
        if _is_meta(args[0]):
            return getattr(torch.ops.fasttrace, self.name)(*args, **kwargs)
        asked = implementation or override(self.name, self.implementations)
        name = asked or self._choice(args, kwargs)
        run = self.implementations[known(self.name, name, self.implementations)]
        if asked or name == self.safe:
            return run(*args, **kwargs)
        try:
            return run(*args, **kwargs)
        except ImplementationError as error:
            self.drop(name, str(error), lasting=error.lasting)
            return self.implementations[self.safe](*args, **kwargs)

    def chosen(self, *args: Any, **kwargs: Any) -> str:
        """The implementation that runs on these arguments when a call names none."""
        return override(self.name, self.implementations) or self._choice(args, kwargs)

    def drop(self, implementation: str, why: str, *, lasting: bool) -> None:
        """Warn that the safe implementation stands in for another one; for the rest of the process if ``lasting``."""
        if lasting:
            self.dropped.add(implementation)
        warnings.warn(
            f"{self.name}: implementation {implementation!r} is left out, {self.safe!r} stands in for it: {why}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        arch = architecture(args[0])
        if arch is None:
            return self.safe
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        shape_class = self.shape_class(*args, **kwargs)
        guess = first_guess(self.name, shape_class, arch) if first.dtype in tuning.HALF else None
        name = tuning.choice(self, shape_class, first, args, kwargs, guess or self.safe)
        return self.safe if name in self.dropped or name not in self.implementations else name


def architecture(operand: Tensor | Sequence[Tensor]) -> int | None:
    """Compute capability of an operand's device as a number (80 for sm_80, 90 for sm_90); ``None`` on a CPU.

    A list of tensors stands for its first one; an empty list for the CPU.
    """
    if not isinstance(operand, Tensor):
        return architecture(operand[0]) if operand else None
    return _capability(operand.device.index or 0) if operand.is_cuda else None


def _is_meta(operand: Tensor | Sequence[Tensor]) -> bool:
    first = operand if isinstance(operand, Tensor) else operand[0] if operand else None
    return first is not None and first.is_meta


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
