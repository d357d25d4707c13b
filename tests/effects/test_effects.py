"""The table of effects: means, intervals, ranks, comparison, joining, and what it says in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fasttrace.effects.effects import Effects
from fasttrace.errors import StudyError
from fasttrace.findings.table import COLUMNS, canonical_order, network_order
from fasttrace.sites import discover_sites, part_sites
from fasttrace.zoo import random_pipeline
from tests.engine.text_models import text_model
from tests.synthetic import row, text_effects, unet_effects, unet_sites

RECORD = {
    "prompts": [{"id": "p00", "seeds": None}, {"id": "p01", "seeds": None}],
    "seeds": [0, 1],
    "sites": "unet",
    "positions": None,
    "steps": None,
    "metrics": ["clip_score"],
    "sigma": {"text_encoder": 1.5},
    "versions": {"torch": "2"},
    "preset": None,
    "screening": None,
}


def test_aie_of_a_balanced_table_is_the_plain_mean():
    effects = unet_effects()
    aie = effects.aie("site").set_index("site")["aie"]
    plain = effects.to_pandas().groupby("site")["indirect_effect"].mean()
    pd.testing.assert_series_equal(aie.sort_index(), plain.sort_index(), check_names=False)


def test_prompts_weigh_the_same_whatever_their_number_of_seeds():
    site = unet_sites()[0]
    rows = [row(0, seed, site, 1.0) for seed in range(9)] + [row(1, 0, site, 3.0)]
    aie = Effects(pd.DataFrame(rows), {}).aie("site").iloc[0]
    assert aie["aie"] == pytest.approx(2.0)
    assert (aie["prompts"], aie["runs"]) == (2, 10)


def test_seeds_are_replicates_that_do_not_narrow_the_interval():
    effects = unet_effects(prompts=5, seeds=1)
    again = pd.concat([effects.table.assign(seed=seed) for seed in range(10)], ignore_index=True)
    columns = ["aie", "low", "high"]
    pd.testing.assert_frame_equal(effects.aie()[columns], Effects(again, {}).aie()[columns])


def test_order_of_rows_changes_nothing():
    effects = unet_effects()
    shuffled = Effects(effects.table.sample(frac=1, random_state=0), {})
    for question in ("aie", "rank", "normalized"):
        one, other = (getattr(e, question)().sort_values("site", ignore_index=True) for e in (effects, shuffled))
        pd.testing.assert_frame_equal(one, other)


def test_headline_is_one_line():
    """One causal state: self-attention of layer 0 at the last subject token."""
    aie = text_effects(prompts=3).where(kind="self_attn").aie(by=["site", "token_role"])
    best = aie.loc[aie["aie"].idxmax()]
    assert best["site"] == "text_encoder.encoder.layers.0.self_attn"
    assert best["token_role"] == "subject_last"
    assert best["aie"] == pytest.approx(7.0)


def test_metrics_and_bases_are_never_averaged_together():
    effects = unet_effects(prompts=2, seeds=1)
    mixed = pd.concat(
        [effects.table, effects.table.assign(metric="latent_l2"), effects.table.assign(base="clean")], ignore_index=True
    )
    aie = Effects(mixed, {}).aie("kind")
    assert set(aie.columns) >= {"kind", "metric", "base"}
    assert len(aie) == 4 * 3


def test_normalized_is_a_ratio_of_means():
    site = unet_sites()[0]
    rows = [row(0, 0, site, 1.0, total_effect=2.0), row(1, 0, site, 1.0, total_effect=8.0)]
    normalized = Effects(pd.DataFrame(rows), {}).normalized("site").iloc[0]
    assert normalized["normalized"] == pytest.approx(2 / 10)
    assert normalized["low"] <= 0.2 <= normalized["high"]


def test_rank_shows_ties():
    sites = unet_sites()[:4]
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(8):
        shared = rng.normal(0, 3)  # common to all sites: pairing must take it out
        for site, effect in zip(sites, (5.0, 5.0, 4.0, 1.0), strict=True):
            rows.append(row(prompt, 0, site, effect + shared + rng.normal(0, 0.2)))
    ranked = Effects(pd.DataFrame(rows), {}).rank()
    assert ranked["rank"].tolist() == [1, 2, 3, 4]
    assert ranked["tied_with_first"].tolist() == [True, True, False, False]
    assert ranked.loc[0, "rank_high"] == 2
    assert (ranked.loc[3, ["rank_low", "rank_high"]] == 4).all()


def test_equal_effects_share_a_rank():
    rows = [row(p, 0, site, e) for p in range(3) for site, e in zip(unet_sites()[:3], (2.0, 2.0, 1.0), strict=True)]
    assert Effects(pd.DataFrame(rows), {}).rank()["rank"].tolist() == [1, 1, 3]


def test_a_prompt_that_only_some_groups_have_does_not_rank_them():
    """A site traced on an easy prompt too is not stronger for it."""
    first, second = unet_sites()[:2]
    rows = [row(p, 0, site, e) for p in range(3) for site, e in ((first, 1.0), (second, 2.0))]
    ranked = Effects(pd.DataFrame([*rows, row(3, 0, first, 100.0)]), {}).rank()
    assert ranked[["site", "rank"]].values.tolist() == [[second.name, 1], [first.name, 2]]
    assert ranked["aie"].tolist() == [2.0, pytest.approx(103 / 4)]


def test_ranks_of_groups_without_a_common_prompt_are_refused():
    first, second = unet_sites()[:2]
    effects = Effects(pd.DataFrame([row(0, 0, first, 1.0), row(1, 0, second, 1.0)]), {})
    with pytest.raises(StudyError, match="share no prompt"):
        effects.rank()


def test_compare_pairs_prompts_seeds_and_samples():
    first, second = unet_sites()[:2]
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(6):
        for seed in range(2):
            shared = rng.normal(0, 5)
            rows += [row(prompt, seed, first, shared + 1.0), row(prompt, seed, second, shared + 0.5)]
    rows.append(row(9, 0, first, 100.0))  # has no partner
    found = Effects(pd.DataFrame(rows), {}).compare(first.name, second.name, metric="clip_score").iloc[0]
    assert found["difference"] == pytest.approx(0.5)
    assert found["low"] == pytest.approx(0.5)
    assert found["high"] == pytest.approx(0.5)
    assert (found["prompts"], found["pairs"]) == (6, 12)
    assert found["p_value"] == pytest.approx(2 / 2**6)


def test_compare_takes_columns_and_refuses_what_is_not_there():
    effects = text_effects(prompts=2)
    layer = "text_encoder.encoder.layers.0.self_attn"
    last, end = {"site": layer, "token_role": "subject_last"}, {"site": layer, "token_role": "eos"}
    assert effects.compare(last, end)["difference"].iloc[0] > 5
    with pytest.raises(StudyError, match="no effects with site='nowhere'"):
        effects.compare("nowhere", layer)


@pytest.mark.parametrize("question", ["aie", "normalized", "rank"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_confidence_that_is_no_share_is_refused(question, prompts):
    effects = unet_effects(prompts=prompts, seeds=1)
    with pytest.raises(StudyError, match="confidence=95: expected a share between 0 and 1"):
        getattr(effects, question)(confidence=95)
    with pytest.raises(StudyError, match="resamples=0: expected at least 1"):
        getattr(effects, question)(resamples=0)


def test_where_names_what_there_is():
    effects = unet_effects(prompts=1, seeds=1)
    assert set(effects.where(kind=["mlp", "resnet"]).table["kind"]) == {"mlp", "resnet"}
    with pytest.raises(StudyError, match="no column 'sight'"):
        effects.where(sight="x")
    with pytest.raises(StudyError, match="there are clip_score"):
        effects.where(metric="latent_l2")


def test_missing_columns_and_empty_tables_are_refused():
    table = unet_effects(prompts=1, seeds=1).table
    with pytest.raises(StudyError, match="token_role"):
        Effects(table.drop(columns="token_role"), {})
    with pytest.raises(StudyError, match="empty"):
        Effects(table.iloc[:0], {})


def test_to_pandas_is_a_copy():
    effects = unet_effects(prompts=1, seeds=1)
    table = effects.to_pandas()
    table["restored"] = 0.0
    assert (effects.table["restored"] != 0).all()


@pytest.mark.parametrize("by", ["prompt_id", "seed"])
def test_halves_joined_equal_the_whole(by):
    whole = Effects(canonical_order(unet_effects(prompts=2, seeds=2).table), RECORD)
    halves = []
    for value in whole.table[by].unique():
        prompts = [p for p in RECORD["prompts"] if by == "seed" or p["id"] == value]
        if by == "seed":
            prompts = [{**prompt, "seeds": [int(value)]} for prompt in prompts]
        halves.append(Effects(whole.where(**{by: value}).table, {**RECORD, "prompts": prompts}))
    joined = halves[1].join(halves[0])
    pd.testing.assert_frame_equal(joined.table, whole.table)
    assert sorted(joined.record["prompts"], key=lambda p: p["id"]) == RECORD["prompts"]
    assert joined.record["seeds"] == RECORD["seeds"]


def test_join_counts_common_rows_once_and_refuses_disagreement():
    whole = Effects(canonical_order(unet_effects(prompts=2, seeds=1).table), RECORD)
    assert len(whole.join(whole)) == len(whole)
    changed = whole.table.copy()
    changed.loc[3, "restored"] += 1.0
    with pytest.raises(StudyError, match="cannot join: unet"):
        whole.join(Effects(changed, RECORD))


def test_join_refuses_other_settings_and_gaps():
    effects = Effects(unet_effects(prompts=1, seeds=1).table, RECORD)
    with pytest.raises(StudyError, match="sigma is"):
        effects.join(Effects(effects.table, {**RECORD, "sigma": {"text_encoder": 2.0}}))
    with pytest.raises(StudyError, match="both prompts and sites"):
        effects.join(Effects(effects.table, {**RECORD, "seeds": [5], "sites": "text"}))
    record = effects.join(Effects(effects.table, {**RECORD, "sites": ["text"], "versions": {}})).record
    assert record["sites"] == ["unet", "text"]


def test_join_keeps_sets_of_steps_apart():
    effects = Effects(unet_effects(prompts=1, seeds=1).table, RECORD)

    def steps_of(first, second):
        records = [{**RECORD, "steps": steps} for steps in (first, second)]
        return Effects(effects.table, records[0]).join(Effects(effects.table, records[1])).record["steps"]

    assert steps_of([0, 1], [2, 3]) == [[0, 1], [2, 3]]
    assert steps_of([[0, 1], [2, 3]], [[2, 3], [4]]) == [[0, 1], [2, 3], [4]]
    assert steps_of(None, [4]) == [None, [4]]
    with pytest.raises(StudyError, match="both have steps from 0 to 9"):
        steps_of([0, 5, 9], [[0, 4, 9]])


def test_save_and_load_give_the_same_table(tmp_path):
    effects = Effects(text_effects().table, RECORD)
    again = Effects.load(effects.save(tmp_path / "run"))
    pd.testing.assert_frame_equal(again.table, effects.table, check_dtype=False)
    assert again.record == RECORD
    with pytest.raises(StudyError, match=r"no effects\.parquet"):
        Effects.load(tmp_path)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "tiny-sdxl"])
def test_network_order_is_execution_order(name):
    names = [site.name for site in discover_sites(random_pipeline(name, device="meta"))]
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert sorted(shuffled, key=network_order) == names


def test_network_order_of_a_t5_encoder_is_execution_order():
    names = [site.name for site in part_sites(text_model("t5"), "text_encoder")]
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert sorted(shuffled, key=network_order) == names


def test_heads_come_one_after_another_before_their_attention():
    def layer(number):
        name = f"text_encoder.encoder.layers.{number}"
        return [*(f"{name}.self_attn.heads.{head}" for head in range(12)), f"{name}.self_attn", f"{name}.mlp", name]

    names = [*layer(0), *layer(1), "text_encoder_2.encoder.layers.0.mlp", "unet.down_blocks.0.resnets.0"]
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert sorted(shuffled, key=network_order) == names


def test_network_order_places_windows_and_sets_by_their_first_site():
    first, second = unet_sites()[3].name, unet_sites()[7].name
    assert network_order(f"{first}..{second}") == network_order(first)
    assert network_order(f"{first} + {second}") == network_order(first)
    assert network_order("unet.up_blocks.*.attn1 + unet.mid_block*")[0] == 1


def test_summary_says_what_was_found_and_how_sure():
    words = unet_effects(prompts=4).summary()
    assert "20 sites" in words
    assert "4 prompts (2 seeds each, 1 noise sample)" in words
    assert "from 30.0 to 20.0, a total effect of 10.0" in words
    strongest = unet_effects(prompts=4).rank().iloc[0]
    assert f"{strongest['site']} brings back most: {strongest['aie']:.2f}" in words
    assert "That is few" in words
    assert "no intervals" in unet_effects(prompts=1).summary()


def test_summary_warns_where_corruption_did_not_lower_the_score():
    table = unet_effects().table.assign(clean=20.0, total_effect=0.0)
    assert "nothing to bring back" in Effects(table, {}).summary()


def test_summary_of_noising_names_the_site_that_is_needed():
    table = unet_effects().table.assign(base="clean", source="corrupted")
    table = table.assign(indirect_effect=-table["indirect_effect"])
    worst = Effects(table, {}).aie().sort_values("aie").iloc[0]
    assert f"{worst['site']} takes away most: {worst['aie']:.2f}" in Effects(table, {}).summary()


def test_noising_ranks_the_site_that_is_needed_most_first():
    restoring = unet_effects()
    table = restoring.table.assign(base="clean", source="corrupted")
    noising = Effects(table.assign(indirect_effect=-table["indirect_effect"]), {})
    expected, found = restoring.rank(), noising.rank()
    same = ["site", "rank", "rank_low", "rank_high", "tied_with_first"]
    pd.testing.assert_frame_equal(found[same], expected[same])
    assert found["aie"].tolist() == (-expected["aie"]).tolist()
    both = Effects(pd.concat([restoring.table, noising.table], ignore_index=True), {}).rank()
    assert both.groupby("base")["site"].first().tolist() == [expected["site"][0]] * 2
    # Patching the target in, and scoring against it: what carries it raises the score.
    towards = Effects(noising.table.assign(source="target"), {"scored_text": "target"}).rank()
    assert towards["site"].tolist() == towards.sort_values("aie", ascending=False)["site"].tolist()


def test_columns_are_those_of_the_contract():
    assert list(unet_effects(prompts=1, seeds=1).table.columns) == list(COLUMNS)


def test_summary_says_what_the_numbers_say():
    first, second = unet_sites()[:2]
    rows = [row(0, seed, site, -2.0 - seed) for site in (first, second) for seed in range(2)] + [row(1, 0, first, -1.0)]
    text = Effects(pd.DataFrame([*rows, row(1, 0, second, -3.0)]), {}).summary()
    assert "(1 to 2 seeds each, " in text
    assert f"{first.name} brings nothing back, and no other does: -1.75 (95% interval -2.50 to -1.00)." in text
    injected = Effects(pd.DataFrame([row(0, 0, first, 1.0, base="clean", source="inject:target")]), {})
    assert "given the text of 'target' to read" in injected.summary()


def test_effects_print_as_one_line():
    assert repr(unet_effects(prompts=2, seeds=1)) == "<Effects: 40 rows of 2 prompts and 20 sites, in clip_score>"
