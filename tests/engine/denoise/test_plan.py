"""Plans: source maps in place equal their reference, calls hold what their rows need, counts are what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fasttrace as ft
from fasttrace.engine.denoise import calls as unet_calls
from fasttrace.engine.denoise.cost import cost_of
from fasttrace.engine.denoise.packing import pack
from fasttrace.engine.denoise.patching import apply_round
from fasttrace.engine.denoise.runs import Key, Row
from fasttrace.engine.denoise.site_map import compose, plan_round
from fasttrace.engine.denoise.trace import UNetRequest, plan_summary, trace_unet_many, unet_request
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims
from fasttrace.ops.restore import ZERO, restore
from tests.engine.unet_cases import conditions, unet_sites


def request(pipe: Any, patches: Any, **options: Any) -> UNetRequest:
    given_conditions = conditions(pipe)
    settings_ = {"latents": None, "seed": 0, "num_inference_steps": 4, "guidance_scale": 3.0, "base": "corrupted",
                 "protocol": "free", "eta": 0.0, "max_batch": None} | options  # fmt: skip
    names = ("negative_embeds", "clean_added", "corrupted_added", "negative_added", "sources")
    return unet_request(
        pipe,
        given_conditions["clean_embeds"],
        given_conditions["corrupted_embeds"],
        patches,
        **{name: given_conditions.get(name) for name in names},
        **settings_,
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("spatial", [False, True])
def test_a_map_in_place_equals_its_reference(spatial: bool, data: st.DataObject) -> None:
    rows, positions, slots = data.draw(st.tuples(st.integers(1, 6), st.sampled_from([1, 6, 12]), st.integers(1, 3)))
    sources = data.draw(st.integers(1, rows))  # rows that may be copied from, and so are never patched
    codes = [ZERO, *range(sources), *range(rows, rows + slots), *range(-3, -3 - slots, -1)]
    wheres = st.none() | st.lists(st.integers(0, positions - 1), min_size=1, unique=True).map(tuple)
    drawn = st.dictionaries(st.integers(0, rows - 1).filter(lambda row: row >= sources),
                            st.tuples(wheres, st.sampled_from(codes))) if sources < rows else st.just({})  # fmt: skip
    one = plan_round(data.draw(drawn), rows, positions, torch.device("cpu"))
    value = torch.randn(rows, positions, 5, generator=torch.Generator().manual_seed(rows))
    bank = torch.randn(slots, positions, 5, generator=torch.Generator().manual_seed(slots))
    expected = restore(value, one.dense(rows), bank)
    padded = torch.cat([value, torch.zeros(2, positions, 5)])
    assert torch.equal(restore(padded, one.dense(rows + 2), bank)[:rows], expected)
    if spatial:
        picture = value.transpose(1, 2).reshape(rows, 5, positions, 1).contiguous(memory_format=torch.channels_last)
        apply_round(picture, one, bank)
        assert torch.equal(picture.flatten(2).transpose(1, 2), expected)
    else:
        apply_round(value, one, bank)
        assert torch.equal(value, expected)


def test_a_layout_that_has_no_view_of_positions_is_patched_all_the_same() -> None:
    value = torch.randn(2, 5, 4, 3).transpose(2, 3)
    expected = value.clone()
    expected[1] = expected[0]
    apply_round(value, plan_round({1: (None, 0)}, 2, 12, torch.device("cpu")), None)
    assert torch.equal(value, expected)


def test_overwrites_of_one_row_apply_in_order() -> None:
    assert compose([((1,), 5), (None, 4), ((1,), 5)]) == [(None, 4), ((1,), 5)]
    assert compose([(None, 4), (None, -3)]) == [(None, 4), (None, -3)]


def key(number: int) -> Key:
    return 0, number, 0


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["root", "joins", "copies"]), st.integers(0, 2)), max_size=40),
    budget=st.integers(1, 20),
    lockstep=st.booleans(),
)
def test_calls_hold_what_their_rows_need(rows: list[tuple[str, int]], budget: int, lockstep: bool) -> None:
    order = {"unet.x": 0, "unet.y": 1}
    plain = [Row(key(number), 0, None, ()) for number in range(3)]
    others = []
    for number, (kind, of) in enumerate(rows, start=3):
        patch = (ft.Patch("unet.x" if number % 2 else "unet.y"), key(of)) if kind != "root" else None
        others.append(Row(key(number), 0, key(of) if kind == "joins" else None, (patch,) if patch else ()))
    everything = plain + others
    sections = pack(everything, budget, order, lockstep)
    assert {row.key for calls in sections for call in calls for row in call} == {row.key for row in everything}
    for calls in sections:
        computed: set[Key] = set()
        for call in calls:
            keys = [row.key for row in call]
            assert len(keys) == len(set(keys))
            assert len(call) <= (max(budget, 2) if lockstep else budget)
            sites = [-1 if row.parent is None else order[row.patches[0][0].site] for row in call]
            assert sites == sorted(sites)
            computed |= set(keys)
            for row in call:
                assert row.parent is None or row.parent in computed
                assert all(source in computed for _, source in row.patches)
        if lockstep and not any(row.parent is not None for call in calls for row in call):
            assert len(calls) <= 1


def test_forced_rows_are_in_the_calls_of_the_trajectory(tiny_sd15: Any) -> None:
    """A call a step: both branches of the corrupted run, the clean row, and the patched ones."""
    patches = [ft.Patch(site) for site in unet_sites(tiny_sd15)[:5]]
    told: list[int] = []
    one = request(tiny_sd15, patches, protocol="teacher_forced")
    next(iter(trace_unet_many([one], progress=told.append)))
    assert told == [3 + len(patches)] * one.steps


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
@pytest.mark.parametrize("max_batch", [None, 3, 7])
def test_the_summary_counts_what_runs(tiny_sd15: Any, protocol: str, max_batch: int | None) -> None:
    sites = unet_sites(tiny_sd15)
    patches = [ft.Patch(sites[2]), ft.Patch(sites[4], steps=[2]), ft.Patch(sites[0], steps=[1], branch="both"), ()]
    requests = [request(tiny_sd15, patches, protocol=protocol, max_batch=max_batch, seed=seed) for seed in (0, 1)]
    told: list[int] = []
    traces = list(trace_unet_many(requests, progress=told.append))
    summary = plan_summary(requests)
    assert sum(told) == summary.rows
    assert max(told) <= (max_batch or 64)
    assert summary.forwards <= summary.rows
    assert summary.runs == 2 * 5
    steps = requests[0].steps
    assert summary.naive_shared == 2 * 6 * steps * 2
    for seed, trace in enumerate(traces):
        alone = next(iter(trace_unet_many([request(tiny_sd15, patches, protocol=protocol, seed=seed)])))
        torch.testing.assert_close(trace.restored, alone.restored, rtol=1e-4, atol=1e-4)


def test_savings_of_the_exact_plans(tiny_sd15: Any) -> None:
    """Forwards of the plans against one whole run a patch, both branches of guidance included."""
    sites, steps = unet_sites(tiny_sd15), 20
    options = {"num_inference_steps": steps}
    every = [ft.Patch(site) for site in sites]
    grid = [ft.Patch(site, steps=[step]) for site in sites for step in range(steps)]
    free, forked = (plan_summary([request(tiny_sd15, runs, **options)]) for runs in (every, grid))
    forced = plan_summary([request(tiny_sd15, every, protocol="teacher_forced", **options)])
    assert free.naive_shared / free.forwards > 1.0
    assert forked.naive_shared / forked.forwards > 1.9
    # Half of the rows by one branch instead of two, and of those nearly half by joining late.
    assert forced.naive_shared / forced.forwards > 2.9


def test_out_of_memory_halves_the_batch_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    patches = [ft.Patch(site) for site in unet_sites(pipe)]
    protocols = ("free", "teacher_forced")
    expected = [next(iter(trace_unet_many([request(pipe, patches, protocol=protocol)]))) for protocol in protocols]
    call, sizes = unet_calls.call_model, []

    def failing(model: Any, inputs: Any, plan: Any, *states: Any) -> Any:
        sizes.append(len(plan.rows))
        if len(plan.rows) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(model, inputs, plan, *states)

    monkeypatch.setattr(unet_calls, "call_model", failing)
    for protocol, whole in zip(protocols, expected, strict=True):
        trace = next(iter(trace_unet_many([request(pipe, patches, protocol=protocol)])))
        torch.testing.assert_close(trace.restored, whole.restored, rtol=1e-8, atol=1e-8)
    assert sum(size > 12 for size in sizes) <= 3  # remembered: not tried again


def test_out_of_memory_with_a_single_row_is_raised(monkeypatch: pytest.MonkeyPatch, tiny_sd15: Any) -> None:
    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(unet_calls, "call_model", failing)
    with pytest.raises(torch.OutOfMemoryError):
        next(iter(trace_unet_many([request(tiny_sd15, [], max_batch=2)])))


@pytest.mark.parametrize("rows", [0, -1])
def test_a_batch_of_no_rows_is_refused(tiny_sd15: Any, rows: int) -> None:
    with pytest.raises(ft.FasttraceError, match=f"max_batch={rows}: expected at least 1"):
        request(tiny_sd15, [], max_batch=rows)


def test_cost_counts_the_true_architecture() -> None:
    """803 GFLOP for one forward of SD1.x at 64 x 64, the text's keys and values (2.4) left out."""
    pipe = ft.zoo.random_pipeline("sd15", device="meta")
    model = describe_unet(pipe.unet)
    cost, order = cost_of(model, Dims(64, 64, 77)), model.order
    assert cost.flops / 1e9 == pytest.approx(801, abs=2)
    assert set(cost.flops_to) == set(order)
    in_order = [cost.flops_to[name] for name in sorted(order, key=order.__getitem__)]
    assert in_order == sorted(in_order)
    assert in_order[-1] < cost.flops
