"""Which implementation of an op runs where nobody measured on the card at hand: data, not code.

``selection.csv`` beside this file holds, for each op, shape class and GPU architecture, the fastest implementation that
was *measured* there (``make gpu`` writes it). It is the first guess for the whole family of that architecture, until
`fasttrace.ops.tuning` has measured on the user's own card; what no row speaks of takes the op's safe choice. Two
overrides: the argument ``implementation="triton"`` of an op, and after it the environment variable ``FASTTRACE_IMPL``,
which is a name for all ops (``triton``) or a list (``attention_restore=triton,geglu=torch``).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import torch

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


def first_guess(op: str, shape_class: str, arch: int) -> str | None:
    """What won on the nearest architecture of the same family: sm_80 speaks for sm_86 and sm_89, sm_90 for no sm_100.

    An older relative is nearer than a newer one. ``None`` where the family has no row.
    """
    family = [known for (name, kind, known) in measured() if (name, kind, known // 10) == (op, shape_class, arch // 10)]
    if not family:
        return None
    nearest = max((known for known in family if known <= arch), default=min(family))
    return measured()[op, shape_class, nearest]


def override(op: str, available: Collection[str]) -> str | None:
    """What ``FASTTRACE_IMPL`` says of an op, or ``None``.

    Raises:
        KernelError: it asks this op, by name, for an implementation that it does not have, or cannot be read. A name
            for all ops is ignored by ops that lack it.
    """
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return None
    general, by_op = parse_override(wanted)
    if op in by_op:
        return known(op, by_op[op], available)
    return general if general in available else None


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


def runs_on_ops(device: torch.device) -> bool:
    """Whether engines run on ops: on a GPU, unless ``FASTTRACE_UNITS`` says ``ops`` or ``modules``.

    Raises:
        KernelError: it says something else.
    """
    wanted = os.environ.get("FASTTRACE_UNITS") or ("ops" if device.type == "cuda" else "modules")
    if wanted not in ("ops", "modules"):
        raise KernelError(f'FASTTRACE_UNITS={wanted!r}: expected "ops" or "modules"')
    return wanted == "ops"
