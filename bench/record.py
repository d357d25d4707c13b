"""Results as rows of ``bench/results/<suite>.csv``, each with the machine, versions, commit and date it came from."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fasttrace.profile.ceilings import machine_name

RESULTS = Path(__file__).parent / "results"
SWITCH = "BENCH_RECORD"
"""Environment variable; ``0`` is said by `make bench`, whose few rounds would take the place of good rows."""
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


def append(suite: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows to a suite's file, unless `SWITCH` is off; columns that an older file lacks are added to it.

    Args:
        suite: name of the file.
        rows: measured figures, with units in their column names (``median_s``, ``ratio``, ``peak_mib``).
    """
    path = RESULTS / f"{suite}.csv"
    if os.environ.get(SWITCH) == "0":
        return path
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    everything = [*old, *({**row, **provenance()} for row in rows)]
    columns = list(dict.fromkeys(name for row in everything for name in row))
    columns = [name for name in columns if name not in provenance()] + list(provenance())
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    return path


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()
