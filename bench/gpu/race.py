"""Timing the ops that passed their tests, one process each, which is started again past whatever ended it."""

from __future__ import annotations

from collections.abc import Iterable

from .budget import Budget

RESTARTS = 8
TRYING = "trying"
"""What a measuring process says before it runs a contender: this, the number of the case, the contender."""


def race(ops: Iterable[str], budget: Budget, quick: bool) -> list[str]:
    """Measure ops in turn until the budget ends. Returns those that did not end well."""
    return [op for op in ops if not race_one(op, budget, quick)]


def race_one(op: str, budget: Budget, quick: bool) -> bool:
    """Measure one op; whether it came to its end. A contender that ends its process is left out, and named."""
    without: list[str] = []
    tried = ["0", ""]
    for _ in range(RESTARTS):

        def heard(line: str) -> None:
            if line.startswith(f"{TRYING} "):
                tried[:] = line.split(" ", 2)[1:]
            else:
                budget.say(line)

        options = ["--from", tried[0], "--until", str(budget.until), *(["--quick"] if quick else [])]
        status = budget.python("-m", "bench.gpu.measure", op, *options, *without, heard=heard)
        if status == 0:
            return True
        if status is None:
            budget.say(f"    {op}: out of time; what was measured is written")
            return False
        if not tried[1] or ["--without", *tried] == without[-3:]:
            budget.say(f"    {op}: exit status {status} before any contender ran")
            return False
        budget.say(f"    {op}: exit status {status} while {tried[1]!r} ran; going on without it")
        without += ["--without", *tried]
    return False
