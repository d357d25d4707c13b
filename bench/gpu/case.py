"""What a kernel tells the GPU benchmark: a true shape, its work, and who competes at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Contender = Callable[[], Tensor]


@dataclass(frozen=True)
class BenchCase:
    """One op at one shape. ``bench/gpu/cases/<op>.py`` has a function ``cases(toy=False) -> list[BenchCase]``.

    With ``toy=True`` it returns small shapes of every kind, at which a test holds the contenders against each other on
    a CPU. Tensors are allocated on torch's default device, which whoever calls ``contenders`` sets.

    Args:
        op: name of the op, as in ``fasttrace/ops/<op>.py``.
        shape: where the shape comes from, such as ``"sd15 self 4096x40 B=16"``.
        shape_class: the op's own class of this shape, which keys the selection table.
        flops: useful floating point operations of one call; padding does not count.
        bytes: bytes that must cross the memory bus at least once.
        bound: which ceiling the case is held to, ``"compute"`` or ``"memory"``.
        contenders: allocates inputs and returns a call for each contender, ``{name: call}``, all with the same result.
            A name that the op itself knows as an implementation (``"triton"``, ``"torch"``, ``"cuda"``) may enter the
            selection table; a name that begins with ``"triton "`` is another config of ours; any other is a rival.
            ``"reference"`` must be among them: it is not timed; the others are held against it, and one that differs is
            reported instead of timed. A call that cannot run here raises, and is reported.
        tolerance: RMS of the difference from the reference, as a share of the reference's RMS.
    """

    op: str
    shape: str
    shape_class: str
    flops: float
    bytes: float
    bound: str
    contenders: Callable[[], dict[str, Contender]]
    tolerance: float = 5e-3
