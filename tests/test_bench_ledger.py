"""The ledger's rules, one at a time, and what it counts of the true UNet."""

from __future__ import annotations

import csv

import pytest
import torch
import torch.nn.functional as F

from bench import ledger
from bench.ledger import COLUMNS, MODELS, by_diffusers, count
from fasttrace.ops.group_norm_silu import group_norm_silu
from fasttrace.ops.linear_restore import linear_restore
from fasttrace.ops.rank_update import update

HALF = {"device": "meta", "dtype": torch.float16}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, **HALF)


def test_a_view_is_no_operator_and_a_copy_is_one():
    x = meta(4, 8)
    assert count(lambda: x.t().reshape(2, 2, 8, 1).squeeze(-1).expand(3, 2, 2, 8), 1).operators == 1  # reshape copies
    assert count(lambda: x.view(8, 4)[2:].unsqueeze(0), 1).operators == 0
    assert count(lambda: torch.empty_like(x), 1).operators == 0


def test_bytes_are_each_operand_once():
    x, y = meta(4, 8), meta(1, 8).expand(4, 8)
    assert count(lambda: x + y, 1).bytes == 2 * (32 + 8 + 32)
    assert count(lambda: x * x, 1).bytes == 2 * (32 + 32)
    assert count(lambda: x.add_(1), 1).bytes == 2 * (32 + 32)  # read and written
    assert count(lambda: x + x, 1).other_bytes == count(lambda: x + x, 1).bytes


def test_a_product_is_not_other_and_has_flops():
    x, w, b = meta(4, 8), meta(16, 8), meta(16)
    seen = count(lambda: F.linear(x, w, b), 2)
    assert (seen.operators, seen.other_bytes, seen.flops) == (1, 0.0, 2 * 4 * 8 * 16)
    assert seen.row()["gflop_row"] == 0.0
    assert seen.floor_seconds == pytest.approx(max(1024 / 990e12, seen.bytes / 3.35e12))


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_with_a_bias_is_charged_a_second_pass(bias):
    x, w, b = meta(2, 4, 6, 6), meta(8, 4, 3, 3), meta(8)
    seen = count(lambda: F.conv2d(x, w, b if bias else None, padding=1), 1)
    assert seen.operators == 1
    assert seen.other_bytes == (2 * 2 * (2 * 8 * 6 * 6) if bias else 0)
    assert seen.flops == 2 * 2 * 36 * 8 * 4 * 9


def test_attention_is_one_operator():
    q, k = meta(2, 3, 10, 8), meta(2, 3, 7, 8)
    seen = count(lambda: F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(2, 10, 24), 1)
    assert (seen.operators, seen.other_bytes) == (1, 0.0)
    assert seen.flops == 4 * 2 * 3 * 10 * 7 * 8


def test_what_waits_or_comes_from_the_host_is_counted():
    x, there = meta(4), torch.zeros(4, dtype=torch.float16)
    assert count(lambda: x.copy_(there), 1).host_copies == 1
    assert count(lambda: there.to("meta"), 1).host_copies == 1
    assert count(lambda: x + 1.0, 1).host_copies == 0
    assert count(lambda: there.nonzero(), 1).synchronising == 1
    assert count(lambda: there.sum().item(), 1).synchronising == 1


def test_an_op_is_one_operator_or_with_epilogues_two():
    x, w, residual = meta(2, 5, 8), meta(16, 8), meta(2, 5, 16)
    source = torch.empty(2, 5, dtype=torch.int32, device="meta")
    fused = count(lambda: linear_restore(x, w, None, residual, source), 1)
    assert (fused.operators, fused.other_bytes, fused.flops) == (1, 0.0, 2 * 10 * 8 * 16)
    split = count(lambda: linear_restore(x, w, None, residual, source), 1, epilogues=True)
    assert (split.operators, split.flops) == (2, fused.flops)
    assert split.other_bytes == 2 * (10 * 16 * 3) + 4 * 10  # value, residual, result; the map
    assert split.bytes == fused.bytes + 2 * 2 * 10 * 16  # the value is written and read
    norm = count(lambda: group_norm_silu(x, meta(8), meta(8), 4), 1)
    assert (norm.operators, norm.other_bytes) == (1, norm.bytes)


def test_an_op_that_returns_nothing_is_counted_by_what_it_writes():
    weights, left, right = [meta(4, 6)], [meta(4, 1)], [meta(6, 1)]
    assert count(lambda: update(weights, left, right, weights), 1).operators == 1


def test_the_unet_of_diffusers():
    seen = count(by_diffusers(MODELS[0]), 16)
    assert seen.operators == 728
    assert seen.row()["gflop_row"] == pytest.approx(803, abs=1)
    assert seen.synchronising == seen.host_copies == 0


def test_the_committed_ledger_is_this_one():
    with (ledger.RESULTS / "ledger.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        committed = list(reader)
    assert tuple(reader.fieldnames or ()) == COLUMNS
    for model in MODELS[::2]:
        (row,) = (one for one in committed if (one["model"], one["path"]) == (model.name, "diffusers"))
        counted = count(by_diffusers(model), ledger.ROWS).row()
        assert {name: str(value) for name, value in counted.items()}.items() <= row.items()
