"""The plan: runs enumerated, roles resolved, and runs that need no forward pass known without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasttrace as ft
from fasttrace.errors import StudyError
from fasttrace.study.axes import parse_steps, step_span
from fasttrace.study.groups import Run, unet_patches
from fasttrace.study.plan import Plan
from tests.pipelines import tiny_pipeline

APPLE = ft.Prompt("a red apple on a table", "apple", id="apple")
CATS = ft.Prompt("a small cat and a small cat", "small cat", id="cats", seeds=(4, 1))


def plan(pipe: Any, *prompts: ft.Prompt, **settings: Any) -> Plan:
    return ft.Study(pipe, **{"prompts": prompts, "metrics": ["latent_l2"], "num_inference_steps": 4, **settings}).plan()


def runs_of(made: Plan, prompt: str) -> tuple[Run, ...]:
    return next(one.runs for one in made.prompts if one.prompt.id == prompt)


def test_each_unet_site_is_one_run_that_patches_all_of_it(tiny_sd15: Any) -> None:
    made = plan(tiny_sd15, APPLE)
    sites = [site for site in ft.discover_sites(tiny_sd15) if site.part == "unet"]
    assert [run.site_set.label for run in runs_of(made, "apple")] == [site.name for site in sites]
    patches = [unet_patches(made.study, run) for run in runs_of(made, "apple")]
    assert [(one.site, one.positions, one.steps, one.branch, one.source) for (one,) in patches] == [
        (site.name, None, None, "cond", "clean") for site in sites
    ]
    assert made.prompts[0].distinct == tuple(range(len(sites)))


def test_roles_are_resolved_for_each_prompt(tiny_sd15: Any) -> None:
    roles = ["subject", "subject_first", "subject_last", "eos", "pad", "all", 0, [1, 3]]
    made = plan(tiny_sd15, APPLE, CATS, sites="text_encoder.encoder.layers.0.mlp", positions=roles, source="zero")

    def resolved(prompt: str) -> dict[str, Any]:
        return {run.token_role: run.text[0][1] for run in runs_of(made, prompt)}

    cats = made.study.tokens["text_encoder"]["cats"]
    assert resolved("apple")["subject"] == resolved("apple")["subject_last"] == (3,)
    assert resolved("cats")["subject"] == (2, 3, 6, 7)
    assert resolved("cats")["subject_first"] == (2, 6)
    assert resolved("cats")["subject_last"] == (3, 7)
    assert resolved("cats")["eos"] == (8,) == (cats.eos,)
    assert resolved("cats")["pad"] == tuple(range(9, 77))
    assert resolved("cats")["all"] is None
    assert resolved("cats")["tokens 1,3"] == (1, 3)
    by_role = {run.token_role: run for run in runs_of(made, "cats")}
    assert (by_role["subject"].position, by_role["subject"].token) == (None, "small cat small cat")
    assert (by_role["eos"].position, by_role["eos"].token) == (8, "<|endoftext|>")
    assert len(by_role["pad"].token) < 60


def test_sets_of_tokens_are_told_apart_and_equal_ones_are_one(tiny_sd15: Any) -> None:
    sets = [[3, 4], [5, 6, 7, 9], [4, 3, 3], [8], "eos"]
    runs = runs_of(plan(tiny_sd15, APPLE, sites="text_encoder.encoder.layers.0.mlp", positions=sets), "apple")
    assert [run.token_role for run in runs] == ["tokens 3-4", "tokens 5-7,9", "pad", "eos"]
    assert [run.text[0][1] for run in runs] == [(3, 4), (5, 6, 7, 9), (8,), (7,)]


def test_sets_of_pixels_are_told_apart_however_many_they_are(tiny_sd15: Any) -> None:
    def label(pixels: list[int]) -> tuple[int | None, str]:
        (run,) = runs_of(plan(tiny_sd15, APPLE, sites="unet.down_blocks.0.resnets.0", positions=pixels), "apple")
        return run.position, run.token_role

    assert label([5]) == (5, "pixel")
    assert label([]) == (None, "pixels none")
    assert label([6, 5, 9]) == (None, "pixels 5-6,9")
    even, other = label(list(range(0, 64, 2))), label([*range(0, 30, 2), *range(31, 63, 2), 62])
    assert even[1].startswith("pixels 0-62, 32 of them, ")
    assert other[1].startswith("pixels 0-62, 32 of them, ")
    assert even != other


def test_sites_that_are_given_twice_are_patched_once(tiny_sd15: Any) -> None:
    site, both = "unet.mid_block.resnets.0", ("unet.mid_block.resnets.0", "unet.mid_block.resnets.1")
    runs = runs_of(plan(tiny_sd15, APPLE, sites=[both, site, (site,), both]), "apple")
    assert [run.site_set.label for run in runs] == [site, " + ".join(both)]


def test_each_token_in_turn_is_labelled_with_its_role(tiny_sd15: Any) -> None:
    made = plan(tiny_sd15, APPLE, sites="text_encoder.encoder.layers.0.mlp")
    runs = runs_of(made, "apple")
    assert [run.position for run in runs] == list(range(77))
    assert [run.token_role for run in runs[:8]] == [
        "bos", "before", "before", "subject_last", "after", "after", "after", "eos",
    ]  # fmt: skip
    tokens = plan(tiny_sd15, APPLE, sites="text_encoder.encoder.layers.0.mlp", positions="tokens")
    assert [run.position for run in runs_of(tokens, "apple")] == list(range(8))


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_tokens_before_the_first_corrupted_one_cost_nothing(tiny_sd15: Any, base: str) -> None:
    made = plan(tiny_sd15, APPLE, sites="text", base=base)
    one = made.prompts[0]
    for run, same in zip(one.runs, one.same_as, strict=True):
        assert (same == -1) == (run.position is not None and run.position < 3)
    assert len(one.distinct) == 9 * (77 - 3)


def test_runs_that_come_out_equal_are_denoised_once(tiny_sd15: Any) -> None:
    positions = ["subject", "subject_last", [3], [0, 3], [1, 2], "all", list(range(3, 77))]
    one = plan(tiny_sd15, APPLE, sites="text_encoder.encoder.layers.1", positions=positions).prompts[0]
    assert [run.token_role for run in one.runs][:2] == ["subject", "subject_last"]
    assert one.same_as == (0, 0, 0, 0, -1, 1, 1)
    assert one.distinct == (0, 5)
    kept = plan(tiny_sd15, APPLE, sites="text_encoder.encoder.layers.1", positions=positions, source="zero").prompts[0]
    assert kept.same_as == (0, 0, 0, 1, 2, 3, 4)  # a value is no no-op anywhere


@given(data=st.data())
def test_equal_runs_and_only_they_share_a_denoising_run(data: st.DataObject) -> None:
    pipe = tiny_pipeline("tiny-sd15")
    sets = data.draw(st.lists(st.sets(st.integers(0, 9)).map(sorted), min_size=2, max_size=6))
    one = plan(pipe, APPLE, sites="text_encoder.encoder.layers.0", positions=[*sets, "eos"]).prompts[0]
    effective = [tuple(p for p in (run.text[0][1] or ()) if p >= 3) if run.text else () for run in one.runs]
    for i, left in enumerate(effective):
        assert (one.same_as[i] == -1) == (left == ())
        for j, right in enumerate(effective):
            assert (one.same_as[i] == one.same_as[j]) == (left == right)
    assert [one.same_as[index] for index in one.distinct] == list(range(len(one.distinct)))


def test_windows_are_adjacent_layers_of_one_kind(tiny_sd15: Any) -> None:
    made = plan(tiny_sd15, APPLE, sites=["text_encoder.*.mlp", "unet*attn2", "unet*attn1"], windows=2)
    labels = {run.site_set.label: run.site_set for run in runs_of(made, "apple")}
    first = labels["text_encoder.encoder.layers.0.mlp..text_encoder.encoder.layers.1.mlp"]
    assert (first.part, first.kind, first.layer, len(first.sites)) == ("text_encoder", "mlp", 0, 2)
    assert sum(one.kind == "mlp" for one in labels.values()) == 2
    count = sum(site.kind == "cross_attn" for site in ft.discover_sites(tiny_sd15))
    assert sum(one.kind == "cross_attn" for one in labels.values()) == count - 1
    skipping = ["text_encoder.encoder.layers.0.mlp", "text_encoder.encoder.layers.2.mlp"]
    with pytest.raises(StudyError, match="no 2 adjacent layers"):
        plan(tiny_sd15, APPLE, sites=skipping, windows=2)


def test_a_set_of_sites_is_one_run_named_as_it_was_asked_for(tiny_sdxl: Any) -> None:
    both = ("text_encoder.encoder.layers.1", "text_encoder_2.encoder.layers.1")
    made = plan(tiny_sdxl, APPLE, sites=[both, ("unet.*attn2", "unet.mid*")], positions="subject")
    text, unet = runs_of(made, "apple")
    assert text.site_set.label == " + ".join(both)
    assert text.site_set.part == "text_encoder+text_encoder_2"
    assert text.text == tuple((name, (3,)) for name in both)
    assert unet.site_set.label == "unet.*attn2 + unet.mid*"
    assert unet.site_set.kind.split("+")[0] in ("resnet", "cross_attn")
    names = [patch.site for patch in unet_patches(made.study, unet)]
    assert names == [
        site.name for site in ft.discover_sites(tiny_sdxl) if site.part == "unet" and
        (site.name.endswith("attn2") or site.name.startswith("unet.mid"))
    ]  # fmt: skip


def test_a_grid_is_every_site_at_every_set_of_steps(tiny_sd15: Any) -> None:
    made = plan(tiny_sd15, APPLE, sites=["unet.mid*", "text_encoder.encoder.layers.0"], steps="each", positions="eos")
    grid = [(run.site_set.label, run.steps) for run in runs_of(made, "apple") if run.site_set.has_unet]
    sites = [site.name for site in ft.discover_sites(tiny_sd15) if site.name.startswith("unet.mid")]
    assert grid == [(name, (step,)) for name in sites for step in range(5)]
    assert [run.steps for run in runs_of(made, "apple") if run.site_set.has_text] == [None]


@given(count=st.integers(1, 60), width=st.integers(1, 60), stride=st.integers(1, 60))
def test_step_windows_leave_no_gap_that_was_not_asked_for(count: int, width: int, stride: int) -> None:
    if width > count:
        with pytest.raises(StudyError, match="width"):
            parse_steps({"width": width, "stride": stride}, count)
        return
    windows = [window for window in parse_steps({"width": width, "stride": stride}, count) if window is not None]
    assert all(window == tuple(range(window[0], window[-1] + 1)) for window in windows)
    assert all(len(window) == width for window in windows[:-1])
    starts = [window[0] for window in windows]
    assert starts == list(range(0, starts[-1] + 1, stride))
    if stride <= width:
        assert {step for window in windows for step in window} == set(range(count))
    assert len({step_span(window, count) for window in windows}) == len(windows)


def test_groups_come_in_order_whatever_the_order_of_the_prompts(tiny_sd15: Any) -> None:
    corruption = ft.GaussianNoise(1.0, samples=2)
    made = plan(tiny_sd15, CATS, APPLE, corruption=corruption, seeds=[9, 3])
    keys = [(group.plan.prompt.id, group.seed, group.noise_sample) for group in made.groups]
    assert keys == [
        (prompt, seed, sample)
        for prompt, seeds in (("apple", (3, 9)), ("cats", (1, 4)))
        for seed in seeds
        for sample in (0, 1)
    ]
    assert plan(tiny_sd15, APPLE, CATS, corruption=corruption, seeds=[9, 3]).prompts == made.prompts
    text = plan(tiny_sd15, CATS, sites="text", metrics=["text_l2"], corruption=corruption)
    assert [(group.seed, group.noise_sample) for group in text.groups] == [(1, 0), (1, 1)]  # the seed changes nothing


def test_a_role_that_a_prompt_lacks_and_a_position_beyond_it_are_refused(tiny_sd15: Any) -> None:
    full = ft.Prompt("a cat " * 37 + "dog", "dog", id="full")
    with pytest.raises(StudyError, match="prompt 'full' has no 'pad' token among its 77"):
        plan(tiny_sd15, full, sites="text", positions="pad")
    with pytest.raises(StudyError, match="position 77 is out of range: the prompts have 77 tokens"):
        plan(tiny_sd15, APPLE, sites="text", positions=[77])


def test_the_summary_counts_what_runs_beside_what_naive_code_would(tiny_sd15: Any) -> None:

    made = plan(tiny_sd15, APPLE, CATS, sites="text", positions=["subject", "all", [0]], seeds=[0, 1])
    counted = made.estimate()
    assert (counted.groups, counted.runs, counted.distinct) == (4, 4 * 27, 4 * 18)
    assert counted.text_runs == 2 * 18
    assert counted.naive == 3 * counted.runs * 5 * 2
    assert counted.forwards < counted.naive / 3
    for number in (counted.groups, counted.runs, counted.text_runs, counted.naive):
        assert f"{number:,}" in made.summary()
    grid = plan(tiny_sd15, APPLE, steps="each").estimate()
    whole = plan(tiny_sd15, APPLE).estimate()
    assert grid.naive == 5 * whole.naive
    assert grid.forwards < 5 * whole.forwards
    assert "no denoising" in plan(tiny_sd15, APPLE, sites="text", metrics=["text_l2"]).summary()


def test_a_plan_of_the_true_architecture_needs_no_weights() -> None:
    with torch.device("meta"):
        pipe = ft.zoo.random_pipeline("sd15", device="meta")
    made = plan(pipe, APPLE, sites="all", corruption=ft.GaussianNoise(0.1))
    assert made.run_count == 70 + 36 * 77
