"""A session on a borrowed GPU, as far as a CPU carries it: the kit, the budget, gates, restarts, a failed capture."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from bench import record
from bench.gpu import __main__ as session_module
from bench.gpu import clock, kit
from bench.gpu.__main__ import Session, run
from bench.gpu.budget import Budget
from bench.gpu.prove import BUILD, COLUMNS, Job, op_jobs, prove, verdicts
from bench.gpu.race import race_one


def budget_of(tmp_path, seconds=60.0) -> Budget:
    return Budget(seconds, tmp_path / "log.txt")


def script(text: str) -> tuple[str, ...]:
    return ("-c", text)


def test_the_kit_makes_the_tree_and_its_wheels_importable(tmp_path):
    with zipfile.ZipFile(tmp_path / "borrowed-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("borrowed_for_a_test.py", "answer = 42")
        wheel.writestr("borrowed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: borrowed\nVersion: 1.0\n")
    code = (
        "import importlib.metadata as m, borrowed_for_a_test as b, fasttrace.kernels.geglu.launch as g;"
        "print(b.answer, m.version('borrowed'), g.__file__)"
    )
    environment = kit.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["42", "1.0", str(kit.ROOT / "kernels" / "geglu" / "launch.py")], done.stderr
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_kit_brings_what_the_tree_needs():
    needed = {name.split(">")[0].strip() for name in importlib.metadata.requires("fasttrace") or ()}
    assert {"diffusers"} <= needed & set(kit.LACKING)


def test_a_command_ends_with_its_time_and_with_what_it_started(tmp_path):
    started = time.monotonic()
    sleep = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = f"import subprocess, sys; print('begun', flush=True); {sleep}"
    heard = []
    budget = budget_of(tmp_path, 3.0)
    assert budget.python(*script(child), heard=heard.append) is None
    assert heard == ["begun"]
    assert time.monotonic() - started < 20
    assert budget.python(*script("print('never')"), heard=heard.append) is None
    assert heard == ["begun"]


def test_tests_run_side_by_side_and_a_failure_stops_no_other(tmp_path):
    jobs = [
        Job("good", script("print('3 passed')")),
        Job("bad", script("print('1 failed'); raise SystemExit(1)")),
        Job("late", script("import time; time.sleep(60)")),
        Job("empty", script("raise SystemExit(5)")),
    ]
    found = prove(jobs, budget_of(tmp_path, 4.0), tmp_path, processes=4)
    assert found == {"good": "passed", "bad": "failed", "late": "out of time", "empty": "no tests"}
    with (tmp_path / "tests.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["name"]: row for row in reader}
    assert tuple(reader.fieldnames or ()) == COLUMNS
    assert rows["good"]["summary"] == "3 passed"
    assert "== bad: failed\n1 failed" in (tmp_path / "failures.txt").read_text()
    assert verdicts(tmp_path / "absent.csv", tmp_path / "tests.csv") == found


def test_tests_that_are_all_skipped_prove_nothing(tmp_path):
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    job = Job("one", ("-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_one.py")))
    assert prove([job], budget_of(tmp_path), tmp_path) == {"one": "no tests"}


def test_every_op_has_gpu_tests_of_its_own():
    ops = sorted(path.stem for path in session_module.CASES.glob("[!_]*.py"))
    assert [job.name for job in op_jobs(ops)] == ops
    for job in op_jobs(ops):
        (path,) = (part for part in job.arguments if part.endswith(".py"))
        text = (kit.ROOT / path).read_text()
        assert "device" in text
        assert job.name in text


def test_a_contender_that_ends_the_process_is_left_out(tmp_path, monkeypatch):
    """The second of three contenders at the second case always ends the process; the first run is told nothing."""
    calls = []
    fake = (
        "import sys; a = sys.argv[1:]; first = int(a[a.index('--from') + 1])\n"
        "for case in range(first, 3):\n"
        "    for name in ('torch', 'sdpa', 'triton 64'):\n"
        "        if case == 1 and name == 'triton 64' and '--without' not in a: sys.exit(75)\n"
        "        print('trying', case, name, flush=True)\n"
        "        if case == 1 and name == 'sdpa' and '--without' not in a: sys.exit(75)\n"
        "print('done')\n"
    )

    class Fake(Budget):
        def python(self, *arguments, **options):
            calls.append(arguments)
            return super().python("-c", fake, *arguments, **options)

    assert race_one("geglu", Fake(60.0, tmp_path / "log.txt"), quick=True)
    assert len(calls) == 2
    assert calls[1][-3:] == ("--without", "1", "sdpa")
    assert calls[1][calls[1].index("--from") + 1] == "1"
    assert "--quick" in calls[0]
    assert "going on without it" in (tmp_path / "log.txt").read_text()


def test_a_process_that_ends_before_any_contender_is_not_started_for_ever(tmp_path):
    class Fake(Budget):
        def python(self, *arguments, **options):
            return 1

    assert not race_one("geglu", Fake(60.0, tmp_path / "log.txt"), quick=False)


def session(tmp_path, monkeypatch, found):
    monkeypatch.setattr(session_module, "prove", lambda jobs, *_: {job.name: found[job.name] for job in jobs})
    raced = []
    monkeypatch.setattr(session_module, "race", lambda ops, budget, quick: raced.extend(ops) or [])
    given = type("Given", (), {"out": tmp_path, "full": False, "tests": [], "op": list(found), "budget": 60.0})
    return Session(given), raced


def test_an_op_whose_tests_fail_is_not_timed_and_the_next_stage_runs(tmp_path, monkeypatch, capsys):
    made, raced = session(tmp_path, monkeypatch, {"geglu": "passed", "quick_gelu": "failed"})
    monkeypatch.setattr(made, "unet", lambda: True)
    assert run(made, ["ops", "unet"], "again") == ["ops"]
    assert raced == ["geglu"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("now: ops, unet")
    assert lines[1].startswith("next: again --stage ops --full")
    assert any("quick_gelu: not timed, its tests: failed" in line for line in lines)


def test_an_earlier_verdict_counts(tmp_path, monkeypatch):
    made, raced = session(tmp_path, monkeypatch, {"geglu": "passed"})
    (tmp_path / "tests.csv").write_text("name,status,seconds,summary\ngeglu,failed,1,\n")
    assert not made.timed()
    assert raced == []


def test_the_extension_is_built_before_the_op_that_may_use_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(session_module, "engine_jobs", list)
    monkeypatch.setattr(
        session_module,
        "prove",
        lambda jobs, *_: asked.append([job.name for job in jobs]) or dict.fromkeys(asked[-1], "passed"),
    )
    given = type(
        "Given", (), {"out": tmp_path, "full": True, "tests": [], "op": ["geglu", "rank_update"], "budget": 9.0}
    )
    assert Session(given).tests()
    assert asked == [[BUILD.name, "geglu"], ["rank_update"]]


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams and graphs that do nothing; a capture fails if the call does."""
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    graph = type("Graph", (), {"replay": lambda self: "replayed"})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda g: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_a_call_that_cannot_be_captured_is_timed_as_it_is(error, fake_cuda, monkeypatch):
    calls = []

    def fussy():
        calls.append(1)
        if len(calls) == 4:  # three before the capture
            raise error("not in a capture")

    monkeypatch.setattr(clock, "require_answer", lambda: None)
    assert clock.captured(fussy) is fussy
    assert clock.captured(lambda: None)() == "replayed"


def test_a_device_that_no_longer_answers_ends_the_process(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(SystemExit) as ended:
        clock.require_answer()
    assert ended.value.code == clock.POISONED


def test_results_of_a_borrowed_machine_join_those_here(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(record, "RESULTS", here)
    (there / "gpu_kernels.csv").write_text("op,machine,commit\ngeglu,H100,abc\n")
    (there / "tests.csv").write_text("name\ngeglu\n")
    record.merge(there)
    record.merge(there)
    with (here / "gpu_kernels.csv").open(newline="") as file:
        assert [row["machine"] for row in csv.DictReader(file)] == ["H100", "H100"]
    assert not (here / "tests.csv").exists()
