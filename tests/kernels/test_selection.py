"""Which implementation runs: the table, the safe choice, and the two overrides."""

from __future__ import annotations

import csv
import importlib
import importlib.resources

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops import selection
from fasttrace.ops._register import Op, architecture, triton_launcher
from fasttrace.ops.attention_restore import attention_restore
from fasttrace.ops.selection import choose, measured, parse_override

HAS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def _table(tmp_path, monkeypatch):
    """A table in which triton won one shape class on sm_90."""
    table = tmp_path / "selection.csv"
    table.write_text(",".join(selection.COLUMNS) + "\ngeglu,wide,90,triton,5.0,torch,6.0,a GPU,2.11.0,3.6.0\n")
    monkeypatch.setattr(selection, "TABLE", table)
    monkeypatch.delenv(selection.ENVIRONMENT, raising=False)
    measured.cache_clear()
    yield
    measured.cache_clear()


@pytest.mark.parametrize(
    ("shape_class", "arch", "expected"),
    [("wide", 90, "triton"), ("wide", 80, "torch"), ("narrow", 90, "torch"), ("wide", None, "torch")],
)
def test_measured_where_it_was_measured_and_safe_elsewhere(shape_class, arch, expected):
    assert choose("geglu", shape_class, arch, HAS, "torch") == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("triton", "triton"),
        ("geglu=reference", "reference"),
        ("triton, geglu=torch", "torch"),
        ("quick_gelu=triton", "torch"),
        ("cuda", "torch"),
        ("", "torch"),
    ],
)
def test_the_environment_overrides(wanted, expected, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT, wanted)
    assert choose("geglu", "narrow", None, HAS, "torch") == expected


@pytest.mark.parametrize("wanted", ["geglu=cuda", "geglu=", "=triton", "triton,torch"])
def test_an_override_that_cannot_be_followed_is_an_error(wanted, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT, wanted)
    parse_override.cache_clear()
    with pytest.raises(KernelError, match=r"geglu|FASTTRACE_IMPL"):
        choose("geglu", "narrow", None, HAS, "torch")


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


def test_triton_on_a_cpu_says_what_to_do(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(KernelError, match="need an NVIDIA GPU"):
        attention_restore(q, q, q, implementation="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match=r"attention_restore: head dimension 168: .* choose another implementation"):
        attention_restore(*[torch.zeros(1, 2, 1, 168)] * 3, implementation="triton")


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
