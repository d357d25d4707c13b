"""Which implementation of an op runs: data, not code.

``selection.csv`` beside this file holds, for each op, shape class and GPU architecture, the fastest implementation that
was *measured* there (``make gpu`` writes it). What was never measured takes the op's safe choice. Two overrides: the
argument ``implementation="triton"`` of an op, and after it the environment variable ``FASTTRACE_IMPL``, which is a name
for all ops (``triton``) or a list (``attention_restore=triton,geglu=torch``).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from ..errors import KernelError

TABLE = Path(__file__).with_name("selection.csv")
COLUMNS = ("op", "shape_class", "arch", "implementation", "time_us", "rival", "rival_us", "gpu", "torch", "triton")
ENVIRONMENT = "FASTTRACE_IMPL"


@lru_cache(maxsize=1)
def measured() -> dict[tuple[str, str, int], str]:
    """``{(op, shape class, architecture): implementation}``; an architecture is 80 for sm_80, 90 for sm_90."""
    with TABLE.open(newline="") as file:
        return {
            (row["op"], row["shape_class"], int(row["arch"])): row["implementation"] for row in csv.DictReader(file)
        }


def choose(op: str, shape_class: str, arch: int | None, available: Collection[str], safe: str) -> str:
    """The implementation that runs when a call names none.

    Args:
        op: name of the op.
        shape_class: the op's own class of the call's shapes.
        arch: compute capability of the device, ``None`` on a CPU.
        available: implementations that the op has.
        safe: what runs where nothing was measured, and on a CPU.

    Raises:
        KernelError: ``FASTTRACE_IMPL`` asks this op, by name, for an implementation that it does not have, or cannot be
            read. A name for all ops is ignored by ops that lack it.
    """
    wanted = os.environ.get(ENVIRONMENT)
    if wanted:
        general, by_op = parse_override(wanted)
        if op in by_op:
            return known(op, by_op[op], available)
        if general in available:
            return general
    if arch is None:
        return safe
    return measured().get((op, shape_class, arch), safe)


def known(op: str, implementation: str, available: Collection[str]) -> str:
    """``implementation`` itself, if ``op`` has it; otherwise a ``KernelError`` that lists what it has."""
    if implementation not in available:
        raise KernelError(
            f"{op} has no implementation {implementation!r}; choose one of {', '.join(sorted(available))}"
        )
    return implementation


@lru_cache
def parse_override(text: str) -> tuple[str, dict[str, str]]:
    """``FASTTRACE_IMPL`` as (name for all ops or "", {op: name})."""
    general, by_op = "", {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, implementation = entry.partition("=")
        if not equals and not general:
            general = entry
        elif equals and op and implementation:
            by_op[op.strip()] = implementation.strip()
        else:
            raise KernelError(f'{ENVIRONMENT}={text!r}: expected one name, or "op=name" parts joined by commas')
    return general, by_op
