"""How an op is registered, and how its implementation is chosen.

An ``Op`` is called directly by the engines, which costs no trip through torch's dispatcher. The same op is registered
as ``torch.ops.fasttrace.<name>`` with its reference on the CPU, the chosen implementation on CUDA and a fake, so that
``torch.compile`` and CUDA graphs keep it whole.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .selection import choose, known

_library: Any = torch.library.Library("fasttrace", "FRAGMENT")  # type: ignore[no-untyped-call]

Implementation = Callable[..., Any]


def triton_launcher(name: str) -> Implementation:
    """The launcher of ``kernels/<name>``, imported at its first call: Triton is optional.

    Raises:
        KernelError: at the call, if Triton cannot be imported, the operands are on a CPU and Triton does not interpret,
            or the launcher refuses its arguments (``ValueError``).
    """

    @cache
    def load() -> Implementation:
        try:
            module = importlib.import_module(f"fasttrace.kernels.{name}.launch")
        except ImportError as error:
            raise KernelError(
                f"{name}: the Triton kernel cannot be imported ({error}); pip install 'fasttrace[triton]', "
                f"or set FASTTRACE_IMPL={name}=torch"
            ) from error
        launcher: Implementation = getattr(module, name)
        return launcher

    def launch(*args: Any, **kwargs: Any) -> Any:
        launcher = load()
        if architecture(args[0]) is None and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelError(
                f"{name}: Triton kernels need an NVIDIA GPU and the operands are on the CPU; move them, choose "
                f"implementation='torch', or start Python with TRITON_INTERPRET=1 to interpret the kernel, slowly"
            )
        try:
            return launcher(*args, **kwargs)
        except ValueError as error:
            raise KernelError(f"{name}: {error}, or choose another implementation of the op") from error

    return launch


class Op:
    """One op: a plain reference and implementations that are held equal to it.

    Args:
        schema: arguments and result in ``torch.library``'s notation, without the name: ``"(Tensor x) -> Tensor"``.
        reference: the truth, in plain PyTorch, for any float dtype, float64 included.
        fake: result's shape and dtype from the arguments' alone.
        implementations: ``{name: callable}``, each with the reference's arguments. ``"reference"`` is added.
        shape_class: class of a call's shapes, from its arguments; the key of the selection table.
        safe: implementation where none was measured, and on a CPU.
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
    ) -> None:
        self.name = name
        self.implementations = {"reference": reference, **implementations}
        self.shape_class = shape_class
        self.safe = known(name, safe, self.implementations)
        _library.define(name + schema)
        _library.impl(name, reference, "CPU")
        _library.impl(name, self, "CUDA")
        torch.library.register_fake(f"fasttrace::{name}", fake, lib=_library)

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Run the op. ``implementation`` overrides the choice, and is an error where the op has no such one."""
        name = self.chosen(*args, **kwargs) if implementation is None else implementation
        return self.implementations[known(self.name, name, self.implementations)](*args, **kwargs)

    def chosen(self, *args: Any, **kwargs: Any) -> str:
        """The implementation that runs on these arguments when a call names none."""
        shape_class = self.shape_class(*args, **kwargs)
        return choose(self.name, shape_class, architecture(args[0]), self.implementations, self.safe)


def architecture(operand: Tensor | Sequence[Tensor]) -> int | None:
    """Compute capability of an operand's device as a number (80 for sm_80, 90 for sm_90); ``None`` on a CPU.

    A list of tensors stands for its first one; an empty list for the CPU.
    """
    if not isinstance(operand, Tensor):
        return architecture(operand[0]) if operand else None
    return _capability(operand.device.index or 0) if operand.is_cuda else None


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
