"""Measure one op's cases beside their rivals: ``python -m bench.gpu.measure OP``. Writes each case as it is done.

A contender may end the process, by an illegal access or a capture that cannot be undone. So the process says on its
standard output what it is about to try (``TRYING``), and whoever runs it starts it again ``--from`` that case,
``--without`` that contender.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record

from .case import BenchCase, Contender
from .clock import Ceilings, ceilings, median_seconds, require_answer
from .race import TRYING

CASES = Path(__file__).parent / "cases"
SUITE = "gpu_kernels"
ENDED = "cannot run: it ended the process"


def ops() -> list[str]:
    """Every op that has cases."""
    return sorted(path.stem for path in CASES.glob("[!_]*.py"))


def cases(op: str, toy: bool = False, quick: bool = False) -> list[BenchCase]:
    """The cases of one op; with ``quick`` the first of each shape class."""
    found: list[BenchCase] = importlib.import_module(f"bench.gpu.cases.{op}").cases(toy=toy)
    if not quick:
        return found
    first: dict[str, BenchCase] = {}
    for case in found:
        first.setdefault(case.shape_class, case)
    return list(first.values())


def is_ours(contender: str) -> bool:
    """Whether a contender is a kernel of this project rather than a rival."""
    return contender in ("cuda", "epilogue") or contender.split()[0].startswith("triton")


def judge(
    case: BenchCase, contenders: dict[str, Contender], trying: Callable[[str], object] = lambda name: None
) -> dict[str, str]:
    """Run every contender once against the reference: ``{name: ""}`` if it agrees, otherwise what is wrong with it."""
    truth = contenders["reference"]()
    verdicts = {}
    for name, run in contenders.items():
        if name == "reference":
            continue
        trying(name)
        try:
            error = _rms_ratio(run(), truth)
        except Exception as reason:  # whatever a rival raises, the others are still measured
            message = (str(reason).strip() or type(reason).__name__).splitlines()[0]
            verdicts[name] = f"cannot run: {message[:120]}"
            if truth.is_cuda:
                require_answer()
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


def measure(
    op: str,
    device: str = "cuda",
    toy: bool = False,
    quick: bool = False,
    first: int = 0,
    without: Collection[tuple[int, str]] = (),
    until: float = float("inf"),
) -> None:
    """Measure every case of an op, print a line a contender, and append to ``gpu_kernels.csv``.

    Args:
        device, toy: for a test without a GPU.
        quick: one case a shape class, and no rival that is compiled, which takes a minute each.
        first: number of the case to begin with.
        without: contenders that ended an earlier process, each with the number of its case.
        until: no case begins after this time, as ``time.time()`` counts.
    """
    top = ceilings()
    print(f"ceilings: {1e-12 * top.flops:.0f} TFLOP/s fp16 GEMM, {1e-9 * top.bytes:.0f} GB/s copy")
    chosen = cases(op, toy, quick)
    for number, case in list(enumerate(chosen))[first:]:
        if time.time() > until:
            print(f"{op}: out of time, {len(chosen) - number} of {len(chosen)} cases not measured")
            return

        def trying(name: str, number: int = number) -> None:
            print(f"{TRYING} {number} {name}", flush=True)

        print(f"{case.op}: {case.shape}")
        try:
            with torch.device(device), torch.no_grad():
                contenders = {
                    name: call for name, call in case.contenders().items() if not (quick and "compile" in name)
                }
                lost = {name: ENDED for name in contenders if (number, name) in without}
                able = {name: call for name, call in contenders.items() if name not in lost}
                verdicts = judge(case, able, trying) | lost
                agreeing = {name: contenders[name] for name, verdict in verdicts.items() if not verdict}
                seconds = median_seconds(agreeing, trying)
        except torch.cuda.OutOfMemoryError as reason:
            print(f"    out of memory: {str(reason).splitlines()[0]}")
            continue
        measured = rows(case, seconds, verdicts, top)
        record.append(SUITE, measured)
        for row in measured:
            print("    " + describe(row), flush=True)
        del contenders, able, agreeing
        gc.collect()
        torch.compiler.reset()  # after eight shapes of one function dynamo would no longer compile it
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=ops())
    parser.add_argument("--quick", action="store_true", help="one case a shape class, nothing compiled")
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the case to begin with")
    parser.add_argument("--without", nargs=2, action="append", default=[], metavar=("CASE", "CONTENDER"))
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since the epoch")
    given = parser.parse_args()
    without = {(int(number), name) for number, name in given.without}
    measure(given.op, quick=given.quick, first=given.first, without=without, until=given.until)


if __name__ == "__main__":
    main()
