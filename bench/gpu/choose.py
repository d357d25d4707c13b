"""Rewrite the selection table from what was measured on this machine: ``python -m bench.gpu.choose``."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bench import record
from fasttrace.ops import selection

from .measure import SUITE


def winners(rows: Iterable[Mapping[str, str]], implementations: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
    """The fastest implementation of each (op, shape class): lowest geometric mean over the class's shapes.

    Args:
        rows: of ``bench/results/gpu_kernels.csv``, of one machine; of equal (shape, contender) the last counts.
        implementations: what each op can select.
    """
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["status"] == "ok":
            times[row["op"], row["shape_class"]][row["contender"]][row["shape"]] = float(row["time_us"])
    chosen = []
    for (op, shape_class), by_name in sorted(times.items()):
        shapes = max((set(by_shape) for by_shape in by_name.values()), key=len)
        mean = {
            name: math.exp(sum(map(math.log, by_shape.values())) / len(shapes))
            for name, by_shape in by_name.items()
            if name in implementations[op] and set(by_shape) == shapes
        }
        if not mean:
            continue
        ranked = sorted(mean, key=lambda name: mean[name])
        row = {"op": op, "shape_class": shape_class, "implementation": ranked[0], "time_us": f"{mean[ranked[0]]:.2f}"}
        if len(ranked) > 1:
            row |= {"rival": ranked[1], "rival_us": f"{mean[ranked[1]]:.2f}"}
        chosen.append(row)
    return chosen


def main() -> None:
    machine = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    with (record.RESULTS / f"{SUITE}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["machine"] == machine]
    known = {
        op: getattr(importlib.import_module(f"fasttrace.ops.{op}"), op).implementations
        for op in {row["op"] for row in rows}
    }
    origin = {
        "arch": str(arch),
        "gpu": machine,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    new = [{**row, **origin} for row in winners(rows, known)]
    with selection.TABLE.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["arch"] != str(arch) or row["op"] not in known]
    with selection.TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, selection.COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *new], key=lambda row: (row["op"], row["shape_class"], int(row["arch"]))))
    for row in new:
        print(f"{row['op']:<26} {row['shape_class']:<16} {row['implementation']}")


if __name__ == "__main__":
    main()
