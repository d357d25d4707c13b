"""Measure one op's cases beside their rivals: ``python -m bench.gpu.measure OP``. Writes each case as it is done."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record

from .case import BenchCase, Contender
from .clock import Ceilings, ceilings, median_seconds

CASES = Path(__file__).parent / "cases"
SUITE = "gpu_kernels"


def ops() -> list[str]:
    """Every op that has cases."""
    return sorted(path.stem for path in CASES.glob("[!_]*.py"))


def cases(op: str, toy: bool = False) -> list[BenchCase]:
    """The cases of one op."""
    found: list[BenchCase] = importlib.import_module(f"bench.gpu.cases.{op}").cases(toy=toy)
    return found


def is_ours(contender: str) -> bool:
    """Whether a contender is a kernel of this project rather than a rival."""
    return contender == "cuda" or contender.split()[0] == "triton"


def judge(case: BenchCase, contenders: dict[str, Contender]) -> dict[str, str]:
    """Run every contender once against the reference: ``{name: ""}`` if it agrees, otherwise what is wrong with it."""
    truth = contenders["reference"]()
    verdicts = {}
    for name, run in contenders.items():
        if name == "reference":
            continue
        try:
            error = _rms_ratio(run(), truth)
        except Exception as reason:  # whatever a rival raises, the others are still measured
            message = (str(reason).strip() or type(reason).__name__).splitlines()[0]
            verdicts[name] = f"cannot run: {message[:120]}"
        else:
            verdicts[name] = "" if error <= case.tolerance else f"differs by {error:.2e} of RMS, limit {case.tolerance}"
    return verdicts


def rows(case: BenchCase, seconds: dict[str, float], verdicts: dict[str, str], top: Ceilings) -> list[dict[str, Any]]:
    """One row a contender: time, rates, share of the ceiling, ratio to the best rival."""
    best_rival = min((s for name, s in seconds.items() if not is_ours(name)), default=float("nan"))
    result: list[dict[str, Any]] = []
    for name, verdict in verdicts.items():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "shape_class": case.shape_class, "contender": name}
        if name in seconds:
            took = seconds[name]
            flop_rate, byte_rate = case.flops / took, case.bytes / took
            share = flop_rate / top.flops if case.bound == "compute" else byte_rate / top.bytes
            row |= {
                "time_us": f"{1e6 * took:.2f}",
                "tflops": f"{1e-12 * flop_rate:.1f}",
                "gbs": f"{1e-9 * byte_rate:.0f}",
            }
            row |= {"bound": case.bound, "percent_of_ceiling": f"{100 * share:.1f}"}
            row |= {"ratio_to_best_rival": f"{best_rival / took:.3f}"}
        row |= {"ceiling_tflops": f"{1e-12 * top.flops:.0f}", "ceiling_gbs": f"{1e-9 * top.bytes:.0f}"}
        result.append({**row, "status": verdict or "ok"})
    return result


def measure(op: str, device: str = "cuda", toy: bool = False) -> None:
    """Measure every case of an op, print a line a contender, and append to ``bench/results/gpu_kernels.csv``.

    ``device`` and ``toy`` are for a test without a GPU.
    """
    top = ceilings()
    print(f"ceilings: {1e-12 * top.flops:.0f} TFLOP/s fp16 GEMM, {1e-9 * top.bytes:.0f} GB/s copy")
    for case in cases(op, toy):
        print(f"{case.op}: {case.shape}")
        try:
            with torch.device(device), torch.no_grad():
                contenders = case.contenders()
                verdicts = judge(case, contenders)
                seconds = median_seconds({name: contenders[name] for name, verdict in verdicts.items() if not verdict})
        except torch.cuda.OutOfMemoryError as reason:
            print(f"    out of memory: {str(reason).splitlines()[0]}")
            continue
        measured = rows(case, seconds, verdicts, top)
        record.append(SUITE, measured)
        for row in measured:
            print("    " + describe(row), flush=True)
        del contenders
        gc.collect()
        torch.cuda.empty_cache()


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    if row["status"] != "ok":
        return f"{row['contender']:<24} {row['status']}"
    rate = f"{row['tflops']} TFLOP/s" if row["bound"] == "compute" else f"{row['gbs']} GB/s"
    share, ratio = f"{row['percent_of_ceiling']}% of ceiling", f"{row['ratio_to_best_rival']}x best rival"
    return f"{row['contender']:<24} {row['time_us']:>10} us  {rate:>16}  {share:>18}  {ratio}"


def _rms_ratio(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


if __name__ == "__main__":
    measure(sys.argv[1])
