"""How time and peak memory grow with patches, prompts, tokens, steps, width and batch size; no rival.

    python -m bench.bench_scaling [text] [unet]

Sizes go up by a factor; of the largest four the exponent of a power law is fitted, to the time, to the memory, and to
the operations that the plan counts: where time grows faster than operations, the engine has overhead. Memory is beside
the weights, results included. Time is the median of two rounds over all sizes, or one call where that takes long.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from fasttrace.profile.peak import peak_of

from . import record
from .curves import CURVES, Curve
from .fit import power_law
from .timing import interleaved

LONG = 5.0  # seconds of a call that is timed once


@torch.no_grad()
def measure(curve: Curve) -> list[dict[str, Any]]:
    """One row for each size."""
    curve.build(curve.sizes[0])[0]()  # what is kept for all sizes, such as weights in another layout
    runs, operations, peaks, long = {}, {}, {}, set()
    for size in curve.sizes:
        name = str(size)
        runs[name], operations[name] = curve.build(size)
        started = time.perf_counter()
        peaks[name] = peak_of(runs[name])[1]
        if time.perf_counter() - started > LONG:
            long.add(name)
    times = interleaved({name: run for name, run in runs.items() if name not in long}, 2, peaks=peaks)
    times |= interleaved({name: runs[name] for name in long}, 1, peaks=peaks)
    return [
        {
            "engine": curve.engine,
            "against": curve.against,
            "size": size,
            "median_s": float(f"{times[str(size)].median:.4g}"),
            "peak_mib": times[str(size)].peak_mib,
            "plan_gflop": float(f"{operations[str(size)]:.4g}"),
        }
        for size in curve.sizes
    ]


def main(names: list[str]) -> None:
    for name in names or CURVES:
        for curve in CURVES[name]:
            rows = measure(curve)
            law = power_law(curve.sizes, [row["median_s"] for row in rows])
            print(f"{curve.engine} against {curve.against}: time grows as {law}", flush=True)
            record.append("scaling", rows)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
