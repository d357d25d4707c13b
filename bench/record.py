"""Results as rows of ``bench/results/<suite>.csv``, each with the machine, versions, commit and date it came from.

``python -m bench.record FOLDER`` adds to them what `bench.gpu` left in a folder on a borrowed machine.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fasttrace.profile.ceilings import machine_name

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
"""Where results go; ``BENCH_RESULTS`` names another folder."""
SWITCH = "BENCH_RECORD"
"""Environment variable; ``0`` is said by `make bench`, whose few rounds would take the place of good rows."""
MERGED = ("gpu_kernels.csv", "unet_gpu.csv")
_PACKAGES = ("torch", "triton", "diffusers", "transformers")


@functools.cache
def provenance() -> dict[str, str]:
    """Where a measurement was made: date, commit, machine, threads and versions."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": machine_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
    }


def merge(folder: Path) -> None:
    """Append the rows that a borrowed machine left in ``folder`` to the suites here, each with its own provenance."""
    for path in sorted(folder.glob("*.csv")):
        if path.name in MERGED:
            with path.open(newline="") as file:
                _append(RESULTS / path.name, list(csv.DictReader(file)))


def append(suite: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows to a suite's file, unless `SWITCH` is off; columns that an older file lacks are added to it.

    Args:
        suite: name of the file.
        rows: measured figures, with units in their column names (``median_s``, ``ratio``, ``peak_mib``).
    """
    path = RESULTS / f"{suite}.csv"
    if os.environ.get(SWITCH) == "0":
        return path
    _append(path, [{**row, **provenance()} for row in rows])
    return path


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    everything = [*old, *rows]
    columns = list(dict.fromkeys(name for row in everything for name in row))
    columns = [name for name in columns if name not in provenance()] + list(provenance())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    merge(Path(sys.argv[1]))
