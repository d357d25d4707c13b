"""How kernels are tested: in Triton's interpreter on a CPU, in a process of its own, and on a GPU where there is one.

A test that takes the ``device`` fixture runs twice, as ``[cpu]`` under TRITON_INTERPRET=1 and as ``[cuda]``. Triton
reads that variable when a kernel is decorated, so the ``[cpu]`` half runs in one child process, which hands its reports
back: each test passes, fails and prints here as if it had run here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

IN_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
REPORTS = "FASTTRACE_TEST_REPORTS"
GUARD = 96
CHILD_TIMEOUT_SECONDS = 900

with torch.device("cpu"):  # torch remembers its constructors at their first use, and must not remember poisoned ones
    torch.empty(0)

child_reports = pytest.StashKey[dict[str, list[pytest.TestReport]]]()
child_output = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: run by `make gpu`"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if IN_CHILD or not item.get_closest_marker("interpreter"):
        return None
    stash = item.session.stash
    if child_reports not in stash:
        stash[child_reports], stash[child_output] = _run_in_child(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[child_reports].get(item.nodeid) or [_lost(item, stash[child_output])]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of the test before, which expected this one to do it
    return True


def _run_in_child(session: pytest.Session) -> tuple[dict[str, list[pytest.TestReport]], str]:
    wanted = [item.nodeid for item in session.items if item.get_closest_marker("interpreter")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports.jsonl"
        path.touch()
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(["-x"] if session.config.getoption("maxfail") == 1 else []),
            *wanted,
        ]
        child = subprocess.run(
            command,
            cwd=session.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(path)},
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_SECONDS,
            check=False,
        )
        reports: dict[str, list[pytest.TestReport]] = {}
        for line in path.read_text().splitlines():
            report = session.config.hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
            reports.setdefault(report.nodeid, []).append(report)
    return reports, f"exit status {child.returncode}\n{child.stdout}\n{child.stderr}"


def _lost(item: pytest.Item, output: str) -> pytest.TestReport:
    message = f"the child process under TRITON_INTERPRET=1 gave no report of this test; it ended with {output}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")


class _ReportWriter:
    """In the child: every report as a line of JSON."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(_ReportWriter(config, os.environ[REPORTS]))


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel runs: interpreted on the CPU, or compiled on a GPU."""
    return request.param


@pytest.fixture
def guarded(device: str) -> Iterator[Callable[..., Tensor]]:
    """Make tensors inside guard regions, and check afterwards that no kernel wrote outside them.

    ``guarded(tensor)`` gives an input of the same values, ``guarded(shape, dtype)`` an output filled with NaN. Guards
    lie before, behind and, with ``gap=n``, in ``n`` elements between the rows of the last dimension. Those of an input
    are NaN, so that a value read from outside poisons the result; those of an output are finite, so that a NaN which
    was computed from outside and written outside shows.
    """
    made: list[tuple[Tensor, Tensor, Tensor]] = []

    def make(content: Tensor | tuple[int, ...], dtype: torch.dtype = torch.float32, *, gap: int = 0) -> Tensor:
        source = content if isinstance(content, Tensor) else nan_filled(content, dtype)
        shape = tuple(source.shape)
        pitch = (shape[-1] if shape else 1) + gap
        rows = 1
        for size in shape[:-1]:
            rows *= size
        poison = nan_filled((2 * GUARD + rows * pitch,), source.dtype)
        buffer = (poison if isinstance(content, Tensor) else torch.full_like(poison, 1)).to(device)
        inside = torch.zeros(buffer.shape, dtype=torch.bool)
        window = buffer[GUARD : GUARD + rows * pitch].view(*shape[:-1], pitch)[..., : pitch - gap]
        inside[GUARD : GUARD + rows * pitch].view(rows, pitch)[:, : pitch - gap] = True
        window.copy_(source)
        made.append((buffer, inside, buffer.cpu()[~inside]))
        return window.view(shape)

    yield make
    for buffer, inside, before in made:
        outside = buffer.cpu()[~inside]
        assert torch.equal(outside.view(torch.uint8), before.view(torch.uint8)), "written outside its tensor"


def nan_filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Poison: NaN, or for whole numbers the smallest value, which is no valid index, code or length."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.full(shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


@pytest.fixture
def nan_like() -> Callable[[Tensor], Tensor]:
    """A tensor of the same shape, dtype and device, filled with NaN."""
    return lambda tensor: torch.full_like(tensor, float("nan"))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, ratio)``: no NaN, and the error's RMS at most ``ratio`` times that expected."""

    def check(actual: Tensor, expected: Tensor, ratio: float) -> None:
        assert actual.shape == expected.shape
        actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
        assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
        error, scale = (actual - expected).square().mean().sqrt(), expected.square().mean().sqrt()
        assert error <= ratio * scale, f"RMS error {error:.3e} is {error / scale:.3e} of RMS {scale:.3e}; limit {ratio}"

    return check


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, so that an element never written fails the test."""

    def fill(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, fill(getattr(owner, name)))
