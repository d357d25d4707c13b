"""What a kernel tells the ahead-of-time compiler: plain data, so that no GPU and no torch is needed to read it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one config, as ``bench/compile_report.py`` compiles it for every architecture in ``archs``.

    Each ``kernels/<op>/launch.py`` has a function ``compile_cases() -> list[CompileCase]`` that covers every entry of
    its configs at a true shape.

    Args:
        kernel: name of the op.
        config: name of the config, unique within the op, such as ``"hd40_self_fp16"``.
        function: the bare ``@triton.jit`` function.
        arguments: type of every run-time argument, in Triton's notation: ``"*fp16"``, ``"i32"``, ``"fp32"``. A suffix
            ``":16"`` says that the pointer or number is divisible by 16, as the launcher's real arguments are.
        constants: value of every ``tl.constexpr`` argument, and ``None`` for an optional argument that is left out.
        num_warps, num_stages: as at launch.
        archs: compute capabilities that use this config.
        has_dot: matrix instructions are expected, and asserted.
    """

    kernel: str
    config: str
    function: Any
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    archs: tuple[int, ...] = (80, 90)
    has_dot: bool = False
