"""Every shape of the benchmark with its work and its floor on an H100 at measured ceilings."""

from __future__ import annotations

from collections.abc import Iterable

from .measure import cases, ops

H100_FLOPS, H100_BYTES = 798e12, 3.0e12


def describe(chosen: Iterable[str] | None = None) -> None:
    """Print each op's shapes."""
    for op in chosen or ops():
        print(op)
        for case in cases(op):
            floor = max(case.flops / H100_FLOPS, case.bytes / H100_BYTES)
            work = f"{1e-9 * case.flops:10.2f} GFLOP {1e-6 * case.bytes:9.1f} MB"
            print(f"    {case.shape:<52} {work}  floor {1e6 * floor:8.1f} us, {case.bound}-bound")
