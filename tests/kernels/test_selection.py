"""Which implementation runs: the table, the safe choice, and the two overrides."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.resources

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops import _register, selection, tuning
from fasttrace.ops._register import ImplementationError, Op, architecture, triton_launcher
from fasttrace.ops.attention_restore import attention_restore
from fasttrace.ops.selection import first_guess, measured, override, parse_override

HAS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def _table(tmp_path, monkeypatch):
    """A table of one shape class, in which another implementation won on each card."""
    table = tmp_path / "selection.csv"
    table.write_text(
        ",".join(selection.COLUMNS) + "\n"
        "geglu,wide,90,triton,5.0,torch,6.0,a GPU,2.11.0,3.6.0\n"
        "geglu,wide,80,cuda,5.0,torch,6.0,a GPU,2.11.0,3.6.0\n"
        "geglu,wide,89,reference,5.0,torch,6.0,a GPU,2.11.0,3.6.0\n"
    )
    monkeypatch.setattr(selection, "TABLE", table)
    monkeypatch.delenv(selection.ENVIRONMENT, raising=False)
    measured.cache_clear()
    yield
    measured.cache_clear()


@pytest.mark.parametrize(
    ("shape_class", "arch", "expected"),
    [
        ("wide", 90, "triton"),
        ("wide", 80, "cuda"),
        ("wide", 86, "cuda"),
        ("wide", 89, "reference"),
        ("wide", 100, None),
        ("narrow", 90, None),
    ],
)
def test_the_nearest_architecture_of_the_family_speaks(shape_class, arch, expected):
    assert first_guess("geglu", shape_class, arch) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("triton", "triton"),
        ("geglu=reference", "reference"),
        ("triton, geglu=torch", "torch"),
        ("quick_gelu=triton", None),
        ("cuda", None),
        ("", None),
    ],
)
def test_the_environment_overrides(wanted, expected, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT, wanted)
    assert override("geglu", HAS) == expected


@pytest.mark.parametrize("wanted", ["geglu=cuda", "geglu=", "=triton", "triton,torch"])
def test_an_override_that_cannot_be_followed_is_an_error(wanted, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT, wanted)
    parse_override.cache_clear()
    with pytest.raises(KernelError, match=r"geglu|FASTTRACE_IMPL"):
        override("geglu", HAS)


@pytest.fixture(scope="module")
def doubling() -> Op:
    return Op(
        "test_doubling",
        "(Tensor x) -> Tensor",
        reference=lambda x: 2 * x,
        fake=torch.empty_like,
        implementations={"torch": lambda x: x + x, "triton": triton_launcher("no_such_kernel")},
        shape_class=lambda x: "any",
    )


def test_an_op_runs_its_choice_directly_and_through_the_dispatcher(doubling, monkeypatch):
    x = torch.arange(3.0)
    for result in (doubling(x), doubling(x, implementation="reference"), torch.ops.fasttrace.test_doubling(x)):
        assert torch.equal(result, torch.tensor([0.0, 2.0, 4.0]))
    with pytest.raises(KernelError, match="no implementation 'cuda'; choose one of reference, torch, triton"):
        doubling(x, implementation="cuda")
    monkeypatch.setenv(selection.ENVIRONMENT, "test_doubling=triton")
    with pytest.raises(KernelError, match="cannot be imported"):
        doubling(x)


@pytest.fixture
def on_a_card(monkeypatch):
    """CPU tensors pass for tensors of an sm_90, and nothing is measured."""
    monkeypatch.setattr(_register, "architecture", lambda operand: 90)
    monkeypatch.setattr(tuning, "choice", lambda op, kind, first, args, kwargs, fallback: fallback)


def halving(implementations, name):
    return Op(
        name,
        "(Tensor x) -> Tensor",
        reference=lambda x: x / 2,
        fake=torch.empty_like,
        implementations={"torch": lambda x: x * 0.5, **implementations},
        shape_class=lambda x: "wide",
    )


@pytest.mark.parametrize("lasting", [True, False])
def test_where_the_chosen_one_cannot_serve_the_safe_one_does(lasting, on_a_card, monkeypatch):
    calls = []

    def refuses(x):
        calls.append(1)
        raise ImplementationError("not on a Sunday", lasting=lasting)

    op = halving({"triton": refuses}, f"test_halving_{lasting}")
    monkeypatch.setattr(_register, "first_guess", lambda *_: "triton")
    x = torch.arange(4, dtype=torch.float16)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="'triton' is left out, 'torch' stands in for it: not on a Sunday"):
            assert torch.equal(op(x), x / 2)
        if lasting:
            break
    if lasting:
        assert torch.equal(op(x), x / 2)
    assert len(calls) == (1 if lasting else 2)
    with pytest.raises(KernelError, match="Sunday"):
        op(x, implementation="triton")
    monkeypatch.setenv(selection.ENVIRONMENT, "triton")
    with pytest.raises(KernelError, match="Sunday"):
        op(x)


def test_a_guess_is_for_the_precision_that_was_measured(on_a_card, monkeypatch):
    op = halving({"triton": lambda x: x}, "test_halving_dtype")
    monkeypatch.setattr(_register, "first_guess", lambda *_: "triton")
    assert op.chosen(torch.zeros(1, dtype=torch.bfloat16)) == "triton"
    assert op.chosen(torch.zeros(1)) == "torch"


def test_a_guess_that_this_op_does_not_have_is_passed_over(on_a_card, monkeypatch):
    op = halving({}, "test_halving_alone")
    monkeypatch.setattr(_register, "first_guess", lambda *_: "cuda")
    assert op.chosen(torch.zeros(1, dtype=torch.float16)) == "torch"


def test_a_kernel_that_does_not_build_is_no_reason_to_stop(on_a_card, monkeypatch):
    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    def launcher(x):
        raise OutOfResources("shared memory, Required: 300000\nand more")

    module = type("Module", (), {"some_kernel": staticmethod(launcher)})
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    monkeypatch.setattr(_register, "first_guess", lambda *_: "triton")
    op = halving({"triton": triton_launcher("some_kernel")}, "test_halving_unbuilt")
    x = torch.arange(4, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match=r"does not build here \(shared memory, Required: 300000\)"):
        assert torch.equal(op(x), x / 2)


def test_triton_on_a_cpu_says_what_to_do(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(KernelError, match="need an NVIDIA GPU"):
        attention_restore(q, q, q, implementation="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match=r"attention_restore: head dimension 168: .* choose another implementation"):
        attention_restore(*[torch.zeros(1, 2, 1, 168)] * 3, implementation="triton")


def test_every_launcher_runs_on_its_operands_device(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    kernels = importlib.resources.files("fasttrace.kernels")
    for folder in sorted(f.name for f in kernels.iterdir() if (f / "launch.py").is_file()):
        module = importlib.import_module(f"fasttrace.kernels.{folder}.launch")
        assert hasattr(getattr(module, folder), "__wrapped__"), f"{folder}: decorate its launcher with on_its_device"


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("operand", [torch.zeros(3), [torch.zeros(3), torch.ones(1)]])
def test_the_device_is_that_of_the_first_operand(operand, by_name, monkeypatch):
    from fasttrace.kernels.configs import on_its_device

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or contextlib.nullcontext())

    @on_its_device
    def launcher(first, second=None):
        return first

    result = launcher(first=operand) if by_name else launcher(operand, second=2)
    assert result is operand
    assert entered[0] is (operand if isinstance(operand, torch.Tensor) else operand[0])
    assert launcher([]) == []


def test_the_architecture_of_operands_on_a_cpu():
    assert architecture(torch.empty(1)) is None
    assert architecture([]) is None
    assert architecture([torch.empty(1)]) is None


def test_the_committed_table_names_only_what_the_ops_have():
    with (importlib.resources.files("fasttrace.ops") / "selection.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == selection.COLUMNS
    for row in rows:
        op = getattr(importlib.import_module(f"fasttrace.ops.{row['op']}"), row["op"])
        assert row["implementation"] in op.implementations
