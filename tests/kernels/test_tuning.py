"""Choosing on the user's card, with a card that is not there: what is dropped, kept, remembered, and when it stops."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from fasttrace.errors import KernelError
from fasttrace.ops import _register, tuning
from fasttrace.ops._register import ImplementationError, Op
from fasttrace.ops.attention_restore import attention_restore
from fasttrace.ops.linear_restore import linear_restore
from fasttrace.ops.restore import KEEP
from fasttrace.ops.tuning import Tuner, difference

X = torch.linspace(-1, 1, 8)


def refuses(x):
    raise ImplementationError("the extension was not built", lasting=True)


def make_op(name: str, **more) -> Op:
    return Op(
        f"test_{name}",
        "(Tensor x) -> Tensor",
        reference=lambda x: 2 * x,
        fake=torch.empty_like,
        implementations={"torch": lambda x: x + x, **more},
        shape_class=lambda x: f"n{x.shape[-1]}",
    )


class Card:
    """A card on which each call takes as many seconds as ``seconds`` says, and a clock that counts them."""

    def __init__(self, path, **seconds: float) -> None:
        self.path, self.now, self.lines, self.calls = path, 0.0, [], 0
        self.seconds = seconds
        self.busy = False

    def tuner(self, seconds: float = 60.0, card: str = "a card") -> Tuner:
        return Tuner(
            self.path,
            card,
            seconds,
            clock=lambda: self.now,
            time_of=self.time_of,
            occupied=lambda first: self.busy,
            say=self.lines.append,
        )

    def time_of(self, call) -> float:
        name = self.order[self.calls % len(self.order)]
        self.calls += 1
        self.now += 10.0
        return self.seconds[name]

    def choose(self, tuner: Tuner, op: Op, x=X) -> str:
        self.order = [name for name in op.implementations if name in self.seconds]
        return tuner.choice(op, op.shape_class(x), x, (x,), {}, op.safe)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "fasttrace" / "choices.json"


def test_the_fastest_that_agrees_is_kept_and_said_once(path):
    card = Card(path, torch=3e-6, fast=1e-6)
    op = make_op("fastest", fast=lambda x: x * 2)
    tuner = card.tuner()
    assert [card.choose(tuner, op) for _ in range(3)] == ["fast"] * 3
    assert card.calls == 2
    assert card.lines == ["fasttrace: test_fastest n8 float32 runs as 'fast' on this card (us: fast 1, torch 3)"]
    assert tuner.used == {"test_fastest n8 float32": {"implementation": "fast", "measured": True}}
    again = Card(path)
    assert again.choose(again.tuner(), op) == "fast"
    assert again.calls == 0
    other = Card(path, torch=1e-6, fast=2e-6)
    assert other.choose(other.tuner(card="another card"), op) == "torch"
    assert set(json.loads(path.read_text())) == {"a card", "another card"}


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (lambda x: 2.01 * x, r"'bad' is left out at test_\w+ n8 float32: it differs .* by 5.0e-03"),
        (lambda x: x * torch.nan, "differs from the reference by inf"),
        (refuses, "'bad' is left out .* the extension was not built"),
        (lambda x: x[100], "'bad' is left out .*out of bounds"),
    ],
)
def test_what_is_wrong_or_missing_is_dropped_by_name(candidate, why, path, request):
    card = Card(path, torch=3e-6)
    op = make_op(f"dropped_{abs(hash(request.node.name))}", bad=candidate)
    with pytest.warns(RuntimeWarning, match=why):
        assert card.choose(card.tuner(), op) == "torch"


def test_it_stops_when_its_time_is_spent_and_goes_on_next_time(path):
    card = Card(path, torch=3e-6, fast=1e-6)
    first, second = (make_op(name, fast=lambda x: x * 2) for name in ("in_time", "too_late"))
    tuner = card.tuner(seconds=25.0)
    assert card.choose(tuner, first) == "fast"
    assert card.choose(tuner, second) == "torch"
    assert card.choose(tuner, second, X[:4]) == "torch"
    assert len(card.lines) == 2
    assert "no time left to measure test_too_late n8" in card.lines[1]
    assert tuner.used["test_too_late n8 float32"] == {"implementation": "torch", "measured": False}
    later = Card(path, torch=3e-6, fast=1e-6)
    assert later.choose(later.tuner(), second) == "fast"


def test_zero_turns_it_off(path, monkeypatch):
    card = Card(path, torch=3e-6, fast=1e-6)
    op = make_op("off", fast=lambda x: x * 2)
    assert card.choose(card.tuner(seconds=0.0), op) == "torch"
    assert card.calls == 0
    assert not path.exists()
    monkeypatch.setenv(tuning.SECONDS, "0")
    assert tuning.seconds_allowed() == 0.0
    monkeypatch.setenv(tuning.SECONDS, "soon")
    with pytest.warns(UserWarning, match="'soon' is no number of seconds; 60 are taken"):
        assert tuning.seconds_allowed() == 60.0


def test_nothing_is_measured_in_a_capture_but_what_is_known_counts(path):
    card = Card(path, torch=3e-6, fast=1e-6)
    op = make_op("captured", fast=lambda x: x * 2)
    tuner = card.tuner()
    card.busy = True
    assert card.choose(tuner, op) == "torch"
    assert card.calls == 0
    card.busy = False
    assert card.choose(tuner, op) == "fast"
    card.busy = True
    assert card.choose(tuner, op) == "fast"


def test_results_that_an_op_writes_are_written_elsewhere(path):
    def double(tensors, out):
        for tensor, target in zip(tensors, out, strict=True):
            target.copy_(2 * tensor)

    op = Op(
        "test_writes",
        "(Tensor[] x, Tensor(a!)[] out) -> ()",
        reference=double,
        fake=lambda *_: None,
        implementations={"torch": double, "wrong": lambda tensors, out: out[0].zero_()},
        shape_class=lambda *_: "any",
        writes=1,
    )
    weights = [X.clone(), X[:3].clone()]
    tuner = Card(path, torch=1e-6).tuner()
    tuner.time_of = lambda call: call() or 1e-6
    with pytest.warns(RuntimeWarning, match="'wrong' is left out"):
        assert tuner.choice(op, "any", weights[0], (weights, weights), {}, "torch") == "torch"
    assert torch.equal(weights[0], X)


def test_a_call_that_is_wrong_itself_is_an_error_of_the_caller(path):
    def checked(x):
        raise KernelError("x [8]: expected [B, P]")

    op = make_op("checked")
    op.implementations["reference"] = checked
    card = Card(path)
    tuner = card.tuner()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KernelError, match="expected"):
            card.choose(tuner, op)


def test_a_reference_that_does_not_fit_is_replaced_by_the_safe_one(path):
    def large(x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    card = Card(path, torch=3e-6, fast=1e-6)
    op = make_op("large", fast=lambda x: x * 2, wrong=lambda x: x)
    op.implementations["reference"] = large
    with pytest.warns(RuntimeWarning, match="'wrong' is left out"):
        assert card.choose(card.tuner(), op) == "fast"


def test_a_file_that_cannot_be_read_or_written_stops_nothing(tmp_path):
    path = tmp_path / "choices.json"
    path.write_text("{")
    card = Card(path, torch=1e-6)
    assert card.choose(card.tuner(), make_op("unread")) == "torch"
    assert set(json.loads(path.read_text())) == {"a card"}
    blocked = Card(path / "below a file" / "choices.json", torch=1e-6)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert blocked.choose(blocked.tuner(), make_op("unwritten")) == "torch"


def test_difference_counts_the_worst_tensor_and_nan_as_infinite():
    one, zero = torch.ones(4), torch.zeros(4)
    assert difference([one, 1.5 * one], [one.double(), one.double()]) == pytest.approx(0.5)
    assert difference([zero], [zero.double()]) == 0.0
    assert difference([one], [zero.double()]) == float("inf")
    assert difference([one * torch.nan], [one.double()]) == float("inf")
    assert difference([one[:0]], [one[:0].double()]) == 0.0


def test_an_op_asks_the_tuner_of_its_card_and_the_record_tells(path, monkeypatch):
    card = Card(path, torch=3e-6, fast=1e-6)
    op = make_op("recorded", fast=lambda x: 2 * x)
    card.order = ["torch", "fast"]
    monkeypatch.setattr(tuning, "_tuners", {0: card.tuner()})
    monkeypatch.setattr(_register, "architecture", lambda operand: 90)
    monkeypatch.setattr(tuning, "cache_path", lambda: path)
    assert tuning.choices() == []
    assert torch.equal(op(X), 2 * X)
    assert tuning.choices() == [
        {
            "device": 0,
            "op": "test_recorded",
            "shape_class": "n8",
            "dtype": "float32",
            "implementation": "fast",
            "measured": True,
        }
    ]
    assert tuning.stored()["a card"]["test_recorded n8 float32"]["us"] == {"fast": 1.0, "torch": 3.0}
    tuning.forget()
    assert tuning.stored() == {}
    assert tuning.choices() == []


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "fasttrace" / "choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_path().parts[-3:] == (".cache", "fasttrace", "choices.json")


def test_the_kernels_themselves_are_candidates(device, path):
    """Real ops on a card that is not there: what runs here agrees and is timed, what cannot is named and dropped."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    x, weight, bias, residual = (torch.randn(s, device=device) for s in ((2, 5, 16), (8, 16), (8,), (2, 5, 8)))
    source = torch.tensor([[KEEP], [0]], dtype=torch.int32, device=device).expand(2, 5)
    card = Card(path, torch=3e-6, epilogue=2e-6, triton=4e-6)
    tuner = card.tuner(seconds=1000.0)
    card.order = ["torch", "epilogue", "triton"]
    args = (x, weight, bias, residual, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.choice(linear_restore, "class", x, args, {}, "torch") == "epilogue"


@pytest.mark.interpreter
def test_a_backend_that_this_machine_lacks_is_named(path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fasttrace[triton]'")
    q = torch.randn(2, 6, 2, 16)
    card = Card(path, torch=3e-6, flash=5e-6, triton=4e-6, triton_padded=1e-6)
    card.order = ["torch", "flash", "triton", "triton_padded"]
    tuner = card.tuner(seconds=1000.0)
    with pytest.warns(RuntimeWarning, match="'cudnn' is left out .*CUDNN_ATTENTION cannot serve this call"):
        assert tuner.choice(attention_restore, "class", q, (q, q, q), {}, "torch") == "triton_padded"
    assert set(tuner.known["attention_restore class float32"]["us"]) == set(card.order)
