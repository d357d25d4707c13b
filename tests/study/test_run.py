"""Running studies: the oracles, both engines, halves, records, pictures and screening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.errors import StudyError
from fasttrace.pipeline import encode_prompt
from fasttrace.study import job as job_module
from fasttrace.study.conditions import TextStates, text_states
from fasttrace.study.injection import trace_injected
from fasttrace.study.job import Job, Options
from fasttrace.study.pictures import _ranked
from fasttrace.study.record import study_record
from fasttrace.study.run import run
from fasttrace.study.schedulers import SCHEDULERS
from fasttrace.study.screening import screen
from tests.pipelines import TINY, tiny_pipeline
from tests.study_cases import APPLE, CAT, EXACT, assert_same, study, table, traced
from tests.synthetic import row, unet_sites


@pytest.fixture
def exact() -> Any:
    return tiny_pipeline("tiny-sd15", torch.float64)


# What a study does to a pipeline.


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_restored_in_every_encoder_give_the_clean_run(name: str) -> None:
    pipe = tiny_pipeline(name, torch.float64)
    parts = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    together = tuple(f"{part}.encoder.layers.1" for part in parts)
    for base, expected in (("corrupted", "clean"), ("clean", "corrupted")):
        rows = table(study(pipe, prompts=[APPLE], sites=[together], positions=["all", []], base=base))
        restored, empty = rows["restored"]
        assert restored == pytest.approx(rows[expected][0], abs=EXACT)
        assert empty == rows[base][0]
        assert abs(rows["total_effect"][0]) > 0.01
        assert rows["indirect_effect"].tolist() == (rows["restored"] - rows[base]).tolist()


@pytest.mark.parametrize("name", TINY)
def test_both_engines_give_the_same_table(name: str) -> None:
    pipe = tiny_pipeline(name, torch.float64)
    made = study(
        pipe, prompts=[CAT], positions=["subject_last", "pad"], steps=[[0], [1]], seeds=[7],
        sites=["unet.mid*", "text*.encoder.layers.0.mlp", ("unet.mid*attn1", "text*.layers.1.mlp")],
        corruption=ft.GaussianNoise("3x", samples=2), metrics=["latent_l2", "latent_cosine"],
    )  # fmt: skip
    fast = table(made)
    assert_same(fast, table(made, "oracle"))
    assert fast["restored"].nunique() > 0.9 * len(fast)
    assert fast["noise_sample"].nunique() == 2


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_results_too_large_for_memory_come_in_pieces(
    exact: Any, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = {"free": "latent_l2", "teacher_forced": "noise_l2"}[protocol]
    made = study(exact, sites=["unet.mid*", "text_encoder.*.mlp"], positions="eos", protocol=protocol, metrics=[metric])
    whole = table(made)
    monkeypatch.setattr(job_module, "RESULT_BYTES", 3 * Job(made, Options())._run_bytes())
    assert_same(table(made), whole)


@pytest.mark.parametrize("name", TINY)
def test_text_states_are_put_together_as_the_pipeline_does(name: str) -> None:
    pipe = tiny_pipeline(name)
    made = study(pipe, prompts=[CAT], sites="text", positions="eos", metrics=["text_l2"])
    states, own = traced(made).states, encode_prompt(pipe, CAT.text)
    torch.testing.assert_close(states.clean.embeds, own.embeds)
    torch.testing.assert_close(states.clean.pooled, own.pooled)
    torch.testing.assert_close(states.clean.time_ids, own.time_ids)


def test_a_patch_in_one_encoder_leaves_the_other_corrupted(tiny_sdxl: Any) -> None:
    sites = ["text_encoder.encoder.layers.0", "text_encoder_2.encoder.layers.0"]
    made = study(tiny_sdxl, prompts=[CAT], sites=sites, positions="all", corruption=ft.GaussianNoise(2.0, samples=2))
    states: TextStates = text_states(made, made.plan().prompts[0], {}, "fast")
    width = tiny_sdxl.text_encoder.config.hidden_size
    for sample in (0, 1):
        clean, corrupted = states.clean, states.corrupted[sample]
        first, second = states.condition(sample, 0), states.condition(sample, 1)
        torch.testing.assert_close(first.embeds[:, :width], clean.embeds[:, :width])
        torch.testing.assert_close(first.embeds[:, width:], corrupted.embeds[:, width:])
        torch.testing.assert_close(second.embeds[:, :width], corrupted.embeds[:, :width])
        torch.testing.assert_close(second.embeds[:, width:], clean.embeds[:, width:])
        torch.testing.assert_close(first.pooled, corrupted.pooled)
        torch.testing.assert_close(second.pooled, clean.pooled)
    assert not torch.allclose(states.corrupted[0].embeds, states.corrupted[1].embeds)


# Schedulers.


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_pairs_its_runs_and_forks_them(scheduler: str) -> None:
    pipe = tiny_pipeline("tiny-sd21", torch.float64)  # v-prediction
    settings: dict[str, Any] = {
        "prompts": [APPLE], "scheduler": scheduler, "num_inference_steps": 3, "seeds": [5],
        "eta": 0.8 if scheduler == "ddim" else 0.0, "guidance_scale": 1.0 if scheduler == "lcm" else 4.0,
    }  # fmt: skip
    made = study(pipe, sites=["unet.mid*attn2", "unet.down*resnets.0"], steps=[[], [1, 2], [2]], **settings)
    first = traced(made)
    assert first.trace is not None
    own = made.traced_pipe(
        APPLE.text, num_inference_steps=3, guidance_scale=made.guidance_scale, eta=made.eta, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    torch.testing.assert_close(first.trace.clean, own, rtol=0, atol=EXACT)
    assert_same(table(made), table(made, "oracle"))
    everywhere = study(pipe, sites=[("unet.*attn2",)], **settings)
    assert table(everywhere)["restored"].tolist() == pytest.approx(table(everywhere)["clean"].tolist(), abs=EXACT)


def test_lcm_takes_the_guidance_scale_as_an_input() -> None:
    import diffusers

    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    pipe.unet = diffusers.UNet2DConditionModel(**{**config, "time_cond_proj_dim": 16}).double().eval()
    pipe.register_to_config(requires_safety_checker=False)
    settings: dict[str, Any] = {"prompts": [APPLE], "scheduler": "lcm", "sites": ["unet.mid*"], "seeds": [5]}
    made = study(pipe, guidance_scale=8.0, **settings)
    first = traced(made)
    assert first.request is not None
    assert first.request.branches == 1
    assert first.trace is not None
    own = made.traced_pipe(
        APPLE.text, num_inference_steps=2, guidance_scale=8.0, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    torch.testing.assert_close(first.trace.clean, own, rtol=0, atol=EXACT)
    assert_same(table(made), table(made, "oracle"))
    other = traced(study(pipe, guidance_scale=2.0, **settings))
    assert other.trace is not None
    assert not torch.allclose(other.trace.clean, first.trace.clean, atol=1e-4)


# Sources.


def test_tokens_before_the_subject_count_where_every_token_reads_all() -> None:
    """In T5 corruption reaches the first token too, so restoring that one is no run that equals its base."""
    from transformers import T5Config, T5EncoderModel

    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=torch.float64)
    torch.manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    config = T5Config(d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2, vocab_size=1000)
    pipe.text_encoder = T5EncoderModel(config).double().eval()
    made = study(
        pipe,
        prompts=[APPLE],
        sites="text_encoder.encoder.block.0",
        positions=[[0], [3], [0, 3], "all"],
        metrics=["text_l2"],
    )
    rows = table(made)
    assert_same(rows, table(made, "oracle"))
    effects = rows.set_index("token_role")["indirect_effect"]
    first, subject, both, everywhere = effects[["bos", "subject_last", "tokens 0,3", "all"]]
    assert len({0.0, first, subject, both}) == 4
    assert everywhere == pytest.approx(rows["total_effect"][0])


def test_injection_everywhere_is_the_other_text_s_run(exact: Any) -> None:
    made = study(
        exact, prompts=[APPLE], base="clean", source="inject:target", sites=[("unet.*attn2",), "unet.mid*attn2"],
        steps=[None, [1], []],
    )  # fmt: skip
    restored = traced(made)
    assert restored.trace is not None
    other = traced(study(exact, prompts=[ft.Prompt(str(APPLE.target), "pizza")], sites="unet.mid*attn2"))
    assert other.trace is not None
    middle, late, everywhere, _ = restored.trace.restored
    torch.testing.assert_close(everywhere, other.trace.clean, rtol=0, atol=EXACT)
    assert not torch.allclose(middle, late)
    rows = table(made)
    assert (rows[rows["step_stop"] == 0]["indirect_effect"] == 0).all()
    assert_same(rows, table(made, "oracle"))


def test_injected_runs_do_not_depend_on_their_batch_mates(exact: Any) -> None:
    first = traced(study(exact, prompts=[APPLE], sites="unet.mid*attn2"))
    assert first.request is not None
    sites = [site for site in ft.discover_sites(exact) if site.kind == "cross_attn"]
    runs = [((site,), steps) for site in sites for steps in (None, (0,))]
    base, other = first.states.clean, encode_prompt(exact, str(APPLE.target))
    told: list[int] = []
    batched = trace_injected(first.request, base, other, runs, 4, told.append)
    alone = torch.cat([trace_injected(first.request, base, other, [one]) for one in runs])
    torch.testing.assert_close(batched, alone, rtol=0, atol=EXACT)
    assert sum(told) == len(runs) * first.request.steps * first.request.branches
    assert trace_injected(first.request, base, other, []).shape == (0, *first.request.latents.shape)


def test_the_mean_of_one_run_is_that_run(exact: Any) -> None:
    """Over one prompt the mean at each position is the clean value itself; in the UNet it is one over pixels."""
    settings: dict[str, Any] = {"prompts": [APPLE], "sites": ["text_encoder.encoder.layers.0.mlp"], "positions": "all"}
    assert_same(
        table(study(exact, source="mean", **settings)).drop(columns="source"),
        table(study(exact, source="clean", **settings)).drop(columns="source"),
    )
    head = "text_encoder.encoder.layers.1.self_attn.heads.1"
    assert_same(
        table(study(exact, source="mean", **{**settings, "sites": head})).drop(columns="source"),
        table(study(exact, source="clean", **{**settings, "sites": head})).drop(columns="source"),
    )
    site = ft.find_site(exact, "unet.mid_block.attentions.0.transformer_blocks.0.attn1")
    values: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda module, args, output: values.append(output[-1].mean(0)))
    exact(APPLE.text, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
    handle.remove()
    made = study(exact, prompts=[APPLE], sites=site.name, source="mean", base="clean", scheduler="pndm")
    means = Job(made, Options())._means[1][site.name]
    torch.testing.assert_close(means, torch.stack(values), rtol=0, atol=EXACT)
    by_hand = ft.trace_unet(
        made.traced_pipe, (states := traced(made).states).clean.embeds, states.corrupted[0].embeds,
        [tuple(ft.Patch(site, steps=[step], source=means[step]) for step in range(len(values)))],
        num_inference_steps=2, base="clean",
    )  # fmt: skip
    trace = traced(made).trace
    assert trace is not None
    torch.testing.assert_close(trace.restored, by_hand.restored, rtol=0, atol=EXACT)


def test_zero_and_other_texts_are_sources_like_any_other(exact: Any) -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    for source, patch_source, sources in (
        ("zero", ft.ZERO, {}),
        ("target", "other", {"other": encode_prompt(exact, str(APPLE.target)).embeds}),
        ("dog", "other", {"other": encode_prompt(exact, "a red dog").embeds}),
    ):
        made = study(exact, prompts=[APPLE], sites=site, source=source, base="clean", sources={"dog": "a red dog"})
        first = traced(made)
        by_hand = ft.trace_unet(
            made.traced_pipe, first.states.clean.embeds, first.states.corrupted[0].embeds,
            [ft.Patch(site, source=patch_source)], num_inference_steps=2, base="clean", sources=sources,
        )  # fmt: skip
        assert first.trace is not None
        torch.testing.assert_close(first.trace.restored, by_hand.restored, rtol=0, atol=EXACT)


def test_padding_interchange_takes_the_padding_of_the_empty_prompt(exact: Any) -> None:
    made = study(
        exact, prompts=[APPLE], sites="text_encoder.encoder.layers.2", positions="pad", source="empty", base="clean",
        metrics=["text_l2"],
    )  # fmt: skip
    states = traced(made).states
    own, empty = encode_prompt(exact, APPLE.text).embeds, encode_prompt(exact, "").embeds
    eos = made.tokens["text_encoder"]["apple"].eos
    expected = torch.cat([own[: eos + 1], empty[eos + 1 :]])
    torch.testing.assert_close(states.restored[0, 0], expected, rtol=0, atol=EXACT)


# Tables that do not depend on how they were made.


def test_halves_joined_are_the_whole_and_the_order_of_prompts_changes_nothing(exact: Any) -> None:
    made = study(exact, sites=["unet.mid*", "text_encoder.*.mlp"], positions="subject", seeds=[4, 0])
    whole = run(made, progress=False)
    shuffled = run(
        study(exact, prompts=[CAT, APPLE], sites=made.sites, positions="subject", seeds=[0, 4]), progress=False
    )
    pd.testing.assert_frame_equal(whole.table, shuffled.table)
    for halves in (
        [made.subset(prompts=["cat"]), made.subset(prompts=["apple"])],
        [made.subset(seeds=[4]), made.subset(seeds=[0])],
    ):
        left, right = (run(half, progress=False) for half in halves)
        assert_same(left.join(right).table, whole.table)


def test_a_study_run_again_from_its_record_gives_the_same_table(exact: Any, tmp_path: Path) -> None:
    made = study(exact, sites="unet.mid*", steps="each", corruption=ft.GaussianNoise("3x", samples=2), eta=0.3)
    first = run(made, out=tmp_path / "run", progress=False, pictures=0)
    again = run(ft.Study.from_json(tmp_path / "run", exact), progress=False)
    pd.testing.assert_frame_equal(first.table, again.table)
    assert first.record == again.record == json.loads((tmp_path / "run" / "study.json").read_text())


# Pictures and screening.


def test_pictures_show_the_strongest_and_the_weakest_runs(exact: Any, tmp_path: Path) -> None:
    made = study(exact, sites=["unet.mid*", "text_encoder.encoder.layers.0"], positions="subject_last")
    effects = run(made, out=tmp_path, progress=False, pictures=1)
    entries = json.loads((tmp_path / "pictures" / "index.json").read_text())
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {entry["file"] for entry in entries} | {"index.json"}
    assert [entry["role"] for entry in entries] == ["clean", "corrupted", "strongest", "weakest"] * 2
    means = effects.table.groupby("site")["indirect_effect"].mean()
    strongest = [entry["site"] for entry in entries if entry["role"] == "strongest"]
    weakest = [entry["site"] for entry in entries if entry["role"] == "weakest"]
    assert strongest == [means.idxmax()] * 2
    assert weakest == [means.idxmin()] * 2
    sizes = {len((tmp_path / "pictures" / entry["file"]).read_bytes()) for entry in entries}
    assert len(sizes) > 2


def test_pictures_rank_as_the_table_does_where_prompts_have_unequal_seeds() -> None:
    first, second = unet_sites()[:2]
    rows = [row(0, seed, first, 3.0) for seed in range(9)] + [row(0, seed, second, 2.0) for seed in range(9)]
    effects = ft.Effects(pd.DataFrame([*rows, row(1, 0, first, 1.0), row(1, 0, second, 3.0)]), {})
    assert _ranked(effects).index[0][0] == effects.rank()["site"][0] == second.name


def test_screening_keeps_the_pairs_that_pass_and_the_noise_of_the_whole(exact: Any) -> None:
    made = study(exact, sites="unet.mid*attn2", seeds=[0, 1], corruption=ft.GaussianNoise("3x", samples=2))
    corrupted = table(made).groupby(["prompt_id", "seed"])["corrupted"].mean().sort_values()
    threshold = float(corrupted.iloc[:3].max())
    smaller, found = screen(made, max_corrupted=threshold, progress=False)
    assert len(found.kept) == 3
    kept = {(prompt.id, seed) for prompt in smaller.prompts for seed in smaller.seeds_of(prompt)}
    assert kept == set(corrupted.index[:3])
    assert smaller.sigma == made.sigma
    assert study_record(smaller)["screening"] == found.record()
    whole = table(made)
    chosen = [key in kept for key in zip(whole["prompt_id"], whole["seed"], strict=True)]
    assert_same(table(smaller), whole[chosen].reset_index(drop=True))
    with pytest.raises(StudyError, match="screen needs a threshold"):
        screen(made)
    with pytest.raises(StudyError, match="screening left no pair: 0 of 4"):
        screen(made, min_clean=1.0, progress=False)


def test_predicted_pictures_and_target_texts_are_scored_alike_by_both_engines(exact: Any) -> None:
    forced = study(exact, sites="unet.mid*", protocol="teacher_forced", metrics=["noise_l2", "noise_cosine", "x0_l2"])
    rows = table(forced)
    assert_same(rows, table(forced, "oracle"))
    assert (rows[rows["metric"] != "noise_cosine"]["clean"] == 0).all()
    assert (rows["total_effect"] > 0).all()

    def words(images: Tensor, prompts: list[str]) -> list[float]:
        return [float(prompt == APPLE.target) for prompt in prompts]

    for scored, expected in (("prompt", 0.0), ("target", 1.0)):
        made = study(exact, prompts=[APPLE], sites="unet.mid*attn2", metrics=[words], scored_text=scored)
        assert set(table(made)["restored"]) == {expected}
