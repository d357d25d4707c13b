"""Choosing implementations on the user's own card: checked against the reference, timed, and remembered.

At the first call of an op with a new class of shapes, every implementation runs on the call's own tensors. One that
raises or differs from the reference is dropped with a warning that names it; the fastest of the others is kept in
``$XDG_CACHE_HOME/fasttrace/choices.json``, under the card, its driver and the versions that were measured. After
``FASTTRACE_TUNE_SECONDS`` (60; 0 turns it off) a process measures no more: what it did not reach keeps the safe choice,
and is taken up by the next one. Nothing is measured inside a graph capture or while ``torch.compile`` traces.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import KernelError

SECONDS = "FASTTRACE_TUNE_SECONDS"
DEFAULT_SECONDS = 60.0
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-9}
"""RMS of the difference from the reference, as a share of the reference's RMS."""

WARM_CALLS, TIMED_CALLS = 2, 9


class Op(Protocol):
    """What is asked of an op: `fasttrace.ops._register.Op`."""

    name: str
    safe: str
    implementations: Mapping[str, Callable[..., Any]]
    writes: int | None


class Tuner:
    """What is known of one card, and the time that may be spent to learn more.

    Args:
        path: the user's file of choices, of all cards.
        card: key of this card in it, which names everything that a measurement depends on.
        seconds: what this process may spend.
        clock: seconds, for the budget.
        time_of: seconds that a call takes on the device.
        occupied: whether tensors may not be computed with now: a capture, a trace.
        say: receives a line for each choice.
    """

    def __init__(
        self,
        path: Path,
        card: str,
        seconds: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        time_of: Callable[[Callable[[], object]], float] | None = None,
        occupied: Callable[[Tensor], bool] | None = None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self.path, self.card, self.left = path, card, seconds
        self.clock = clock
        self.time_of = time_of or device_seconds
        self.occupied = occupied or is_occupied
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.known: dict[str, dict[str, Any]] = _read(path).get(card, {})
        self.used: dict[str, dict[str, Any]] = {}

    def choice(
        self,
        op: Op,
        shape_class: str,
        first: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        fallback: str,
    ) -> str:
        """The implementation for a call: what was measured for its class, now if need be, or else ``fallback``."""
        key = f"{op.name} {shape_class} {str(first.dtype).removeprefix('torch.')}"
        found = self.known.get(key)
        if found is None and self.left > 0 and not self.occupied(first):
            found = self._measured(op, key, first.dtype, args, kwargs)
        name = str(found["implementation"]) if found else fallback
        if key not in self.used or self.used[key]["implementation"] != name:
            self.used[key] = {"implementation": name, "measured": found is not None}
        return name

    def _measured(
        self, op: Op, key: str, dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        started = self.clock()
        try:
            times = self._times(op, key, TOLERANCE[dtype], started, args, kwargs)
        finally:
            self.left -= self.clock() - started
        if times is None:
            self.say(f"fasttrace: no time left to measure {key}; it keeps {op.safe!r}, see {SECONDS}")
            return None
        winner = min(times, key=lambda name: times[name])
        microseconds = {
            name: round(1e6 * seconds, 2) for name, seconds in sorted(times.items(), key=lambda one: one[1])
        }
        found = {"implementation": winner, "us": microseconds}
        self.known[key] = found
        _write(self.path, self.card, key, found)
        listed = ", ".join(f"{name} {took:g}" for name, took in microseconds.items())
        self.say(f"fasttrace: {key} runs as {winner!r} on this card (us: {listed})")
        return found

    def _times(
        self, op: Op, key: str, tolerance: float, started: float, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, float] | None:
        """Seconds of each implementation that agrees; ``None`` if the time ran out before all were tried."""
        truth: list[Tensor] | None = None
        times: dict[str, float] = {}
        for name in ("reference", op.safe, *(n for n in op.implementations if n not in ("reference", op.safe))):
            if self.clock() - started >= self.left:
                return None
            try:
                call, result = trial(op, name, args, kwargs)
                call()
                if truth is None:
                    truth = [tensor.double() for tensor in result()]
                elif (error := difference(result(), truth)) > tolerance:
                    _warn(op, name, key, f"it differs from the reference by {error:.1e} of its RMS, limit {tolerance}")
                    continue
                if name != "reference":
                    times[name] = self.time_of(call)
            except torch.cuda.OutOfMemoryError:
                if name == op.safe:
                    raise
                continue  # the reference's, whose place the safe implementation takes, or a candidate's own
            except Exception as error:
                if name == op.safe or (name == "reference" and isinstance(error, KernelError)):
                    raise  # no candidate's fault: the call itself is wrong
                _warn(op, name, key, (str(error).strip() or type(error).__name__).splitlines()[0])
        return times


def trial(
    op: Op, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """A call of one implementation that leaves the arguments alone, and what gives its results after it."""
    run, given = op.implementations[name], list(args)
    if op.writes is not None:
        given[op.writes] = [torch.empty_like(tensor) for tensor in given[op.writes]]
        return lambda: run(*given, **kwargs), lambda: given[op.writes]
    results: list[Any] = []

    def call() -> None:
        results[:] = [run(*given, **kwargs)]

    return call, lambda: [tensor for tensor in _flat(results) if isinstance(tensor, Tensor)]


def difference(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """RMS of the difference as a share of the truth's, the largest of any tensor; infinite for what is not finite."""
    worst = 0.0
    for result, expected in zip(results, truth, strict=True):
        if not expected.numel():
            continue
        error = float((result.double() - expected).square().mean().sqrt())
        scale = float(expected.square().mean().sqrt())
        ratio = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
        worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


def device_seconds(call: Callable[[], object]) -> float:
    """Median time of a call between two events on the current stream."""
    for _ in range(WARM_CALLS):
        call()
    seconds = []
    for _ in range(TIMED_CALLS):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        seconds.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(seconds)


def is_occupied(tensor: Tensor) -> bool:
    """Whether a graph is being captured, code is being traced, or the tensor stands for one that is not there."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def choice(
    op: Op, shape_class: str, first: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], fallback: str
) -> str:
    """The choice of the tuner of ``first``'s card."""
    return tuner_of(first.device.index or 0).choice(op, shape_class, first, args, kwargs, fallback)


def choices() -> list[dict[str, Any]]:
    """What ran in this process, for a study's record: op, shape class, dtype, implementation, whether it was measured.

    Empty on a CPU, where nothing is chosen.
    """
    rows = []
    for index, tuner in sorted(_tuners.items()):
        for key, used in sorted(tuner.used.items()):
            op, shape_class, dtype = key.split(" ")
            rows.append({"device": index, "op": op, "shape_class": shape_class, "dtype": dtype, **used})
    return rows


def stored() -> dict[str, dict[str, Any]]:
    """All that is remembered, by card: ``{card: {"op class dtype": {"implementation": ..., "us": {...}}}}``."""
    return _read(cache_path())


def forget() -> None:
    """Forget what was measured on any card, so that it is measured again."""
    cache_path().unlink(missing_ok=True)
    _tuners.clear()


_tuners: dict[int, Tuner] = {}


def tuner_of(index: int) -> Tuner:
    """The tuner of a CUDA device, made at its first use."""
    if index not in _tuners:
        _tuners[index] = Tuner(cache_path(), card_of(index), seconds_allowed())
    return _tuners[index]


def seconds_allowed() -> float:
    """``FASTTRACE_TUNE_SECONDS``, or its default."""
    text = os.environ.get(SECONDS, "")
    try:
        return float(text) if text else DEFAULT_SECONDS
    except ValueError:
        warnings.warn(f"{SECONDS}={text!r} is no number of seconds; {DEFAULT_SECONDS:g} are taken", stacklevel=2)
        return DEFAULT_SECONDS


def cache_path() -> Path:
    """The user's file of choices."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrace" / "choices.json"


@cache
def card_of(index: int) -> str:
    """Everything that a measurement on a CUDA device depends on, as one line."""
    versions = [f"{name} {_version(name)}" for name in ("torch", "triton", "fasttrace")]
    return ", ".join([torch.cuda.get_device_name(index), f"driver {_driver()}", *versions])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def _flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, list | tuple) else [value]


def _warn(op: Op, name: str, key: str, why: str) -> None:
    warnings.warn(f"{op.name}: candidate {name!r} is left out at {key}: {why}", RuntimeWarning, stacklevel=4)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, card: str, key: str, found: Mapping[str, Any]) -> None:
    """Add one choice to the file as it is now: another process may have added others. A full disk stops nothing."""
    content = _read(path)
    content.setdefault(card, {})[key] = dict(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(content, indent=1, sort_keys=True))
        scratch.replace(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}): measured again next time", stacklevel=2)
