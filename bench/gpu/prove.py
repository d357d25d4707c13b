"""The GPU tests, an op a process and many at once: which ops may be timed.

A wrong access on a GPU stays with its process for good, so every op is tested in one of its own. Verdicts go to
``tests.csv`` as they come, what failed to ``failures.txt``.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .budget import Budget

COLUMNS = ("name", "status", "seconds", "summary")
PROCESSES = 12
KEPT_LINES = 150
TESTS = Path("tests/kernels")
WAYS_UP = ("geglu", "gelu_up", "quick_gelu")


@dataclass(frozen=True)
class Job:
    """One command: pytest on some tests, or a build that others need."""

    name: str
    arguments: tuple[str, ...]


def pytest_job(name: str, *arguments: str) -> Job:
    return Job(name, ("-m", "pytest", "-m", "gpu", "--maxfail=5", "--tb=short", "-p", "no:xdist", *arguments))


BUILD = Job("csrc", ("setup.py", "--quiet", "build_ext", "--inplace"))


def op_jobs(ops: Iterable[str]) -> list[Job]:
    """The tests of each op: ``tests/kernels/test_<op>.py``, or its part of a file that several share."""
    jobs = []
    for op in ops:
        if op in WAYS_UP:
            jobs.append(pytest_job(op, str(TESTS / "test_way_up.py"), "-k", op))
        else:
            jobs.append(pytest_job(op, str(TESTS / f"test_{op}.py")))
    return jobs


def engine_jobs() -> list[Job]:
    """What is no op's alone: helpers that kernels share, and the engines against the oracle."""
    return [pytest_job("common", str(TESTS / "test_common.py")), pytest_job("engine", "tests/engine")]


def prove(jobs: Iterable[Job], budget: Budget, folder: Path, processes: int | None = None) -> dict[str, str]:
    """Run jobs side by side; their statuses: ``passed``, ``failed``, ``no tests`` or ``out of time``.

    A row goes to ``tests.csv`` when a job ends.
    """
    workers = processes or min(PROCESSES, os.cpu_count() or 1)
    statuses: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_run, job, budget): job for job in jobs}
        for done in as_completed(running):
            job, (status, seconds, lines) = running[done], done.result()
            statuses[job.name] = status
            summary = next((line.strip("= ") for line in reversed(lines) if line.strip()), "")
            _append(folder / "tests.csv", (job.name, status, f"{seconds:.0f}", summary))
            budget.say(f"    {job.name:<26} {status:<12} {seconds:4.0f} s  {summary}")
            if status != "passed":
                with (folder / "failures.txt").open("a") as file:
                    file.write(f"== {job.name}: {status}\n" + "\n".join(lines[-KEPT_LINES:]) + "\n\n")
    return statuses


def verdicts(*files: Path) -> dict[str, str]:
    """What earlier runs found, the last word of each name."""
    found: dict[str, str] = {}
    for path in files:
        if path.exists():
            with path.open(newline="") as file:
                found |= {row["name"]: row["status"] for row in csv.DictReader(file)}
    return found


def _run(job: Job, budget: Budget) -> tuple[str, float, list[str]]:
    lines: list[str] = []
    started = time.monotonic()
    environment = {"FASTTRACE_BUILD_EXT": "1", "OMP_NUM_THREADS": "2"}
    status = budget.python(*job.arguments, environment=environment, heard=lines.append)
    named = {0: "passed", 5: "no tests", None: "out of time"}.get(status, "failed")
    if named == "passed" and "pytest" in job.arguments and not any(" passed" in line for line in lines[-1:]):
        named = "no tests"  # all of them skipped
    return named, time.monotonic() - started, lines


def _append(path: Path, row: tuple[str, ...]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
