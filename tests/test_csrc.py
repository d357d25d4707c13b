"""csrc/ without a GPU: nvcc compiles it, its CUDA kernel runs on host threads, and its binding runs on the CPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttrace import _ext
from fasttrace.errors import KernelError
from fasttrace.ops import rank_update as op

CSRC = Path(__file__).parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
BINDING_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}/include"]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROUNDING = {torch.float32: 3e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SHAPES = [(64, 256, 1), (33, 129, 3), (1, 1, 1), (0, 7, 2), (7, 0, 2), (31, 130, 17), (70, 36, 64), (5, 4, 0)]

gxx = shutil.which("g++")
nvcc = shutil.which("nvcc")
needs_gxx = pytest.mark.skipif(gxx is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="nvcc is not installed")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def cuda_include() -> Path:
    """Folder of the toolkit's headers, as nvcc itself names it."""
    listing = run(nvcc, "--dryrun", "-x", "cu", "/dev/null", "-o", "/dev/null")
    top = re.search(r"^#\$ TOP=(.+)$", listing, re.MULTILINE)
    assert top, listing
    return Path(top[1]) / "include"


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_every_cuda_kernel_compiles_without_spills(arch, tmp_path):
    for source in sorted(CSRC.glob("*.cu")):
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        log = run(nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", gencode, "-c", source, "-o", tmp_path / "object.o")
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert len(spills) == 2 * log.count("Compiling entry function") > 0, log
        assert set(spills) == {"0"}, log
        assert all(int(count) <= 128 for count in re.findall(r"Used (\d+) registers", log)), log


@needs_nvcc
@needs_gxx
def test_the_binding_compiles_with_its_cuda_half():
    run(gxx, *BINDING_FLAGS, "-DUSE_CUDA", f"-I{cuda_include()}", "-fsyntax-only", CSRC / "bindings.cpp")


class Matrix(ctypes.Structure):
    """``RankUpdateMatrix`` of csrc/rank_update.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out", "left", "right")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "rank")),
    ]


Update = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


@pytest.fixture(scope="module")
def kernel_on_threads(tmp_path_factory) -> Update:
    """The CUDA kernel, run by host threads."""
    library = tmp_path_factory.mktemp("threads") / "kernel.so"
    source = Path(__file__).with_name("cuda_on_threads.cpp")
    run(
        gxx,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-pthread",
        f"-I{CSRC}",
        "-isystem",
        cuda_include(),
        source,
        "-o",
        library,
    )
    launch = ctypes.CDLL(str(library)).fasttrace_rank_update_cuda

    def update(out, weights, left, right):
        table = (Matrix * len(weights))(
            *(
                Matrix(
                    w.data_ptr(),
                    o.data_ptr(),
                    a.data_ptr(),
                    b.data_ptr(),
                    w.stride(0),
                    o.stride(0),
                    *w.shape,
                    a.shape[1],
                )
                for o, w, a, b in zip(out, weights, left, right, strict=True)
            )
        )
        assert launch(table, len(weights), TYPES[weights[0].dtype], None) == 0

    return update


@pytest.fixture(scope="module")
def binding(tmp_path_factory) -> Update:
    """The stable-ABI binding with its CPU twin, as an extension build makes it, without CUDA."""
    library = tmp_path_factory.mktemp("binding") / "_C.so"
    sources = [CSRC / "bindings.cpp", CSRC / "rank_update_cpu.cpp"]
    run(gxx, *BINDING_FLAGS, "-shared", *sources, "-o", library, f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10")
    torch.ops.load_library(str(library))
    return torch.ops.fasttrace_ext.rank_update


@pytest.fixture(params=["binding", pytest.param("kernel_on_threads", marks=needs_nvcc)])
def update(request) -> Update:
    return request.getfixturevalue(request.param)


def problem(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], padding: int = 0) -> tuple[list[Tensor], ...]:
    """Weights whose rows lie ``padding`` elements apart, and fp32 factors."""
    generator = torch.Generator().manual_seed(len(shapes) + padding)
    weights = [torch.randn(n, k + padding, generator=generator).to(dtype)[:, :k] for n, k, _ in shapes]
    left = [torch.randn(n, r, generator=generator) for n, _, r in shapes]
    right = [torch.randn(k, r, generator=generator) for _, k, r in shapes]
    return weights, left, right


def assert_updated(out, weights, left, right):
    for o, w, a, b in zip(out, weights, left, right, strict=True):
        expected = w.double() + a.double() @ b.double().T
        assert not o.isnan().any()
        assert (o.double() - expected).norm() <= ROUNDING[w.dtype] * expected.norm()


@needs_gxx
@pytest.mark.parametrize("padding", [0, 1, 8])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equals_float64_and_writes_inside_its_matrices_alone(update, dtype, padding):
    weights, left, right = problem(dtype, SHAPES, padding)
    buffers = [torch.full((w.shape[0] + 2, w.shape[1] + padding), torch.nan, dtype=dtype) for w in weights]
    out = [buffer[1:-1, : w.shape[1]] for buffer, w in zip(buffers, weights, strict=True)]
    update(out, weights, left, right)
    assert_updated(out, weights, left, right)
    for buffer, w in zip(buffers, weights, strict=True):
        assert buffer[[0, -1]].isnan().all()
        assert buffer[:, w.shape[1] :].isnan().all()


@needs_gxx
def test_in_place_and_more_matrices_than_one_launch_holds(update):
    weights, left, right = problem(torch.float16, [(3, 4, 2)] * 100)
    before = [w.clone() for w in weights]
    update(weights, weights, left, right)
    assert_updated(weights, before, left, right)


@needs_gxx
def test_the_binding_refuses_what_it_cannot_read(binding):
    weights, left, right = problem(torch.float32, [(4, 6, 2)])
    for bad in (
        (weights, weights, left, []),
        (weights, [weights[0].double()], left, right),
        (weights, weights, [left[0].half()], right),
        (weights, weights, [left[0][:3]], right),
        (weights, weights, left, [right[0][:, :1].contiguous()]),
        ([weights[0].T.contiguous().T], weights, left, right),
    ):
        with pytest.raises(RuntimeError):
            binding(*bad)


@needs_gxx
def test_the_op_reaches_the_binding_and_marks_what_was_written(binding, monkeypatch):
    monkeypatch.setattr(op, "load_error", lambda: None)
    weights, left, right = problem(torch.float16, SHAPES)
    left[0], right[0] = left[0].half(), right[0].T.contiguous().T
    before, versions = [w.clone() for w in weights], [w._version for w in weights]
    op.rank_update(weights, left, right, inplace=True, implementation="cuda")
    assert_updated(weights, before, left, right)
    assert all(w._version > version for w, version in zip(weights, versions, strict=True))
    with pytest.raises(KernelError, match="fp32, fp16 or bf16"):
        op.rank_update([w.double() for w in weights], left, right, implementation="cuda")


@pytest.mark.skipif(_ext.available(), reason="the extension is installed")
def test_without_the_extension_the_op_says_why():
    weights, left, right = problem(torch.float32, [(2, 3, 1)])
    with pytest.raises(KernelError, match="FASTTRACE_BUILD_EXT=1"):
        op.rank_update(weights, left, right, implementation="cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build: the extension may be built here")
@pytest.mark.parametrize(
    ("wish", "message"), [("1", "is a CPU build"), ("yes", "expected auto, 0 or 1"), ("auto", None), ("0", None)]
)
def test_setup_builds_the_extension_only_where_it_can(wish, message):
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=CSRC.parent,
        env={**os.environ, "FASTTRACE_BUILD_EXT": wish},
        capture_output=True,
        text=True,
        check=False,
    )
    if message is None:
        assert (done.returncode, done.stdout.strip().splitlines()[-1]) == (0, "fasttrace")
    else:
        assert done.returncode != 0
        assert message in done.stderr
