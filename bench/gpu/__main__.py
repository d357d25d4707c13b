"""Prove and measure on a GPU, in stages: ``python -m bench.gpu [STAGE ...]``, or ``--list``.

Every stage is a process of its own, ends within eight minutes, and writes what it has as it goes. Tests come first: if
one fails, nothing is measured. On a machine without a GPU this says what it would run, and why it stops.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import cases, ops

STAGE_SECONDS = 480
H100_FLOPS, H100_BYTES = 798e12, 3.0e12


@dataclass(frozen=True)
class Stage:
    """A command line, run by this interpreter."""

    name: str
    arguments: tuple[str, ...]
    required: bool = False


def stages() -> list[Stage]:
    """Tests, then one stage an op, the table of what won, and with it in use the suites ``bench/bench_*.py``."""
    suites = sorted(path.stem for path in Path(__file__).parent.parent.glob("bench_*.py"))
    return [
        Stage("tests", ("-m", "pytest", "-m", "gpu", "tests/kernels"), required=True),
        *(Stage(op, ("-m", "bench.gpu.measure", op)) for op in ops()),
        Stage("selection", ("-m", "bench.gpu.choose")),
        *(Stage(suite, ("-m", f"bench.{suite}")) for suite in suites),
    ]


def describe(stage: Stage) -> None:
    """Print a stage and, for an op, each shape with its floor on an H100 at measured ceilings."""
    print(f"{stage.name}: python {' '.join(stage.arguments)}")
    for case in cases(stage.name) if stage.name in ops() else []:
        floor = max(case.flops / H100_FLOPS, case.bytes / H100_BYTES)
        work = f"{1e-9 * case.flops:10.2f} GFLOP {1e-6 * case.bytes:9.1f} MB"
        print(f"    {case.shape:<52} {work}  floor {1e6 * floor:8.1f} us, {case.bound}-bound")


def run(stage: Stage) -> bool:
    """Run a stage; whether it ended well."""
    print(f"== {stage.name}", flush=True)
    started = time.monotonic()
    try:
        status = subprocess.run([sys.executable, *stage.arguments], timeout=STAGE_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"== {stage.name}: stopped after {STAGE_SECONDS} s; what it had measured is written")
        return False
    print(f"== {stage.name}: exit status {status} after {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help="stages to run, in the order given (default: all)")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    arguments = parser.parse_args()
    known = {stage.name: stage for stage in stages()}
    unknown = [name for name in arguments.stage if name not in known]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; choose from {', '.join(known)}")
    chosen = [known[name] for name in arguments.stage] or list(known.values())
    if arguments.list or not torch.cuda.is_available():
        for stage in chosen:
            describe(stage)
        if not torch.cuda.is_available():
            print(f"Nothing was run: torch {torch.__version__} sees no NVIDIA GPU. Run this on a machine that has one.")
        return
    failed = []
    for stage in chosen:
        if run(stage):
            continue
        failed.append(stage.name)
        if stage.required:
            break
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
