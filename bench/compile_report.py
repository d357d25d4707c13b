"""Compile every config of every Triton kernel for sm_80 and sm_90, one of each for sm_100, on a machine with no GPU.

``python -m bench.compile_report [--out FILE] [--only OP]`` writes one row a config and architecture: registers,
bytes spilled, shared memory of a block, and the matrix instruction found in the machine code.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from fasttrace.kernels.aot import CompileCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "compile.csv"
COLUMNS = ("kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "mma")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PTXAS_TARGET = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
MATRIX_INSTRUCTIONS = ("UTCHMMA", "HGMMA", "HMMA", "IMMA", "DMMA")


def all_cases(only: str | None = None) -> Iterator[CompileCase]:
    """Cases of every ``kernels/<op>/launch.py``, ops in alphabetical order.

    Blackwell runs Hopper's configs; the first of each kernel is compiled for it too.
    """
    seen = set()
    for launch in sorted((ROOT / "kernels").glob("*/launch.py")):
        op = launch.parent.name
        if only in (None, op):
            for case in importlib.import_module(f"fasttrace.kernels.{op}.launch").compile_cases():
                first = 90 in case.archs and (op, case.kernel) not in seen
                seen |= {(op, case.kernel)} if first else set()
                yield dataclasses.replace(case, archs=(*case.archs, 100)) if first else case


def compile_case(case: CompileCase, arch: int) -> dict[str, Any]:
    """Compile one case for one architecture, and read the result's machine code. One row of the report."""
    names = case.function.arg_names
    missing = set(names) - set(case.arguments) - set(case.constants)
    if missing:
        raise ValueError(f"{case.kernel}/{case.config}: no type or constant for {', '.join(sorted(missing))}")
    signature = {n: case.arguments[n].removesuffix(":16") if n in case.arguments else "constexpr" for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if case.arguments.get(n, "").endswith(":16")
    }
    source = ASTSource(case.function, signature, {(names.index(n),): v for n, v in case.constants.items()}, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        assembler = "ptxas-blackwell" if arch >= 100 else "ptxas"
        usage = _run(assembler, "-v", f"-arch={PTXAS_TARGET[arch]}", str(ptx), "-o", str(Path(folder) / "again.cubin"))
        code = _run("cuobjdump", "-sass", str(cubin))
    return {
        "kernel": case.kernel,
        "config": case.config,
        "arch": f"sm_{arch}",
        "registers": int(re.findall(r"Used (\d+) registers", usage)[0]),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", usage)),
        "shared_bytes": compiled.metadata.shared,
        "mma": next((name for name in MATRIX_INSTRUCTIONS if re.search(rf"\b{name}\b", code)), "none"),
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to write (default: %(default)s)")
    parser.add_argument("--only", help="one op, such as attention_restore; rows of the others are left out")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in all_cases(arguments.only):
            for arch in case.archs:
                row = compile_case(case, arch)
                writer.writerow(row)
                file.flush()
                print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
