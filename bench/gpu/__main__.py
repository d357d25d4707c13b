"""Prove and measure on a GPU: ``python -m bench.gpu``; on a borrowed one with ``--here --out DIR --budget 540``.

Stages, in this order unless ``--stage`` names some: ``tests`` (every op's GPU tests at once, csrc built, the engines
against the oracle), ``ops`` (each op beside its rivals; one whose tests fail is not timed), ``selection`` (the table of
what won), ``unet`` (SD1.x at 2, 16 and 64 rows, with a profile), ``suites`` (``bench/bench_*.py``). A failure stops
nothing else; every result is written when it is there; all ends within the budget.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import kit
from .budget import Budget
from .prove import BUILD, engine_jobs, op_jobs, prove, verdicts
from .race import race

SPARE_SECONDS = 5.0
STAGES = ("tests", "ops", "selection", "unet", "suites")
NEXT = {
    "tests": "--stage ops --quick",
    "ops": "--stage unet",
    "unet": "--stage ops --full, then python -m bench.gpu.choose",
}
ROWS = ("2", "16", "64")
AFTER_BUILD = "rank_update"
BENCH = Path(__file__).parent.parent
CASES = BENCH / "gpu" / "cases"
RESTARTED = "FASTTRACE_HERE"


class Session:
    """One call: what it was asked for, its budget and its folder of results."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.quick: bool = not given.full
        self.earlier: list[Path] = given.tests
        self.ops: list[str] = given.op or sorted(path.stem for path in CASES.glob("[!_]*.py"))
        self.budget = Budget(given.budget - SPARE_SECONDS, self.out / "log.txt")

    def tests(self) -> bool:
        apart = [op for op in self.ops if op == AFTER_BUILD]
        jobs = [BUILD, *op_jobs(op for op in self.ops if op not in apart), *engine_jobs()]
        found = prove(jobs, self.budget, self.out) | prove(op_jobs(apart), self.budget, self.out)
        return all(status in ("passed", "no tests") for status in found.values())

    def proved(self) -> list[str]:
        """Ops that passed their tests, in this call or an earlier one; those never tested are tested now."""
        found = verdicts(*self.earlier, self.out / "tests.csv")
        found |= prove(op_jobs(op for op in self.ops if op not in found), self.budget, self.out)
        for op in self.ops:
            if found[op] != "passed":
                self.budget.say(f"    {op}: not timed, its tests: {found[op]}")
        return [op for op in self.ops if found[op] == "passed"]

    def timed(self) -> bool:
        proved = self.proved()
        return not race(proved, self.budget, self.quick) and proved == self.ops

    def unet(self) -> bool:
        until, table = str(self.budget.until), str(self.out / "profile.txt")
        command = ("-m", "bench.bench_unet_gpu", "--rows", *ROWS, "--profile", table, "--until", until)
        return self.budget.python(*command) == 0

    def selection(self) -> bool:
        return self.budget.python("-m", "bench.gpu.choose") == 0

    def suites(self) -> bool:
        names = sorted(path.stem for path in BENCH.glob("bench_*.py") if path.stem != "bench_unet_gpu")
        statuses = [self.budget.python("-m", f"bench.{name}") for name in names]
        return not any(status != 0 for status in statuses)


def run(session: Session, stages: list[str], again: str) -> list[str]:
    """Run stages; those that did not end well. Says first what this call does and what to run after it."""
    budget = session.budget
    budget.say(f"now: {', '.join(stages)}, in {budget.seconds:.0f} s, results in {session.out}")
    budget.say(f"next: {again} {NEXT.get(stages[-1], '')}".rstrip())
    calls: dict[str, Callable[[], bool]] = {name: getattr(session, name) for name in STAGES if name != "ops"}
    calls["ops"] = session.timed
    failed = []
    for name in stages:
        budget.say(f"== {name}, {budget.left:.0f} s left")
        if not calls[name]():
            failed.append(name)
    return failed


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be given several times (default: all)")
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--here", action="store_true", help="run from the tree and .kit: no network, nothing installed")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, all of them (default: no limit)")
    parser.add_argument("--tests", type=Path, action="append", default=[], help="tests.csv of an earlier call")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="ops: one case a shape class, nothing compiled (the default)"
    )
    size.add_argument("--full", action="store_true", help="ops: every case and rival")
    parser.add_argument("--list", action="store_true", help="say each shape and its floor, and run nothing")
    return parser.parse_args()


def main() -> None:
    given = parsed()
    if given.here and RESTARTED not in os.environ:
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, {**kit.environment(), RESTARTED: "1"})
    import torch

    if given.list or not torch.cuda.is_available():
        from .floors import describe

        describe(given.op)
    if not torch.cuda.is_available():
        print(f"Nothing was run: torch {torch.__version__} sees no NVIDIA GPU. Run this on a machine that has one.")
    if given.list or not torch.cuda.is_available():
        return
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["BENCH_RESULTS"] = str(given.out)
    again = " ".join(["python -m bench.gpu", *(["--here"] if given.here else []), f"--out {given.out}"])
    failed = run(Session(given), given.stage or list(STAGES), again)
    if failed:
        sys.exit(f"not all well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
