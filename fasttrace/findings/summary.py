"""What a table of effects says, in words: what was done, what was found, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .findings import Findings
from .statistics import mean_interval
from .wording import KIND_NAMES, counted, number, steps_label

FEW_PROMPTS = 10


def summarize(effects: Findings, by: str | Sequence[str] | None = None) -> str:
    """Paragraphs on each metric of a table.

    Args:
        effects: the table.
        by: columns that name what is compared; sites by default, with token roles where they vary.
    """
    keys = [by] if isinstance(by, str) else list(by) if by else _default_keys(effects)
    paragraphs = [_what_was_done(effects)]
    spread = [name for name in effects.meaning() if name != "metric"]
    if spread:
        values = ", ".join(str(value) for value in effects.table[spread[0]].unique())
        paragraphs.append(
            f"The table mixes runs of several kinds ({spread[0]}: {values}); choose one with "
            f"effects.where({spread[0]}=...) for what was found in it."
        )
        return "\n".join(paragraphs)
    for metric in effects.table["metric"].unique():
        one = effects.where(metric=metric)
        total = _what_corruption_did(one)
        paragraphs.append(f"{metric}: {total} {_what_sites_did(one, keys)}")
    paragraphs.append(_how_sure(effects))
    return "\n".join(paragraphs)


def _default_keys(effects: Findings) -> list[str]:
    keys = ["site"]
    if effects.table["token_role"].nunique() > 1:
        keys.append("token_role")
    if effects.table["step_start"].nunique() > 1 or effects.table["step_stop"].nunique() > 1:
        keys += ["step_start", "step_stop"]
    return keys


def _what_was_done(effects: Findings) -> str:
    table = effects.table
    prompts = table["prompt_id"].nunique()
    seeds = table.groupby("prompt_id")["seed"].nunique()
    per = counted(seeds.max(), "seed")
    if prompts > 1:
        per = f"{per} each" if seeds.min() == seeds.max() else f"{seeds.min()} to {per} each"
    verb = "restored from the clean run" if table["base"].iloc[0] == "corrupted" else "overwritten in the clean run"
    if table["base"].nunique() > 1:
        verb = "patched"
    elif str(table["source"].iloc[0]).startswith("inject:"):
        verb = f"given the text of {str(table['source'].iloc[0]).removeprefix('inject:')!r} to read"
    elif table["source"].iloc[0] not in ("clean", "corrupted"):
        verb = f"overwritten with {table['source'].iloc[0]!r}"
    runs, sites = len(table) / table["metric"].nunique(), table["site"].nunique()
    samples = counted(table["noise_sample"].nunique(), "noise sample")
    return (
        f"{counted(runs, 'run')}: {counted(sites, 'site')}, {verb}, in {counted(prompts, 'prompt')} ({per}, {samples})."
    )


def _what_corruption_did(effects: Findings) -> str:
    means = effects.table.groupby("prompt_id")[["clean", "corrupted", "total_effect"]].mean()
    low, high = (float(end) for end in mean_interval(means["total_effect"].to_numpy()))
    clean, corrupted, total = means.mean()
    interval = "" if pd.isna(low) else f" (95% interval {number(low)} to {number(high)})"
    text = (
        f"corrupting the subject moved the score from {number(clean)} to {number(corrupted)}, a total effect of "
        f"{number(total)}{interval}."
    )
    if total <= 0 or low <= 0 <= high:
        text += (
            " That does not show that corruption lowers the score, so there may be nothing to bring back: check the "
            "pictures, or use a larger noise scale."
        )
    return text


def _what_sites_did(effects: Findings, keys: list[str]) -> str:
    ranked, needed = effects.rank(by=keys), effects.direction() < 0
    top = ranked.iloc[0]
    some = effects.direction() * top["aie"] > 0
    share = f", {100 * abs(top['share']):.0f}% of the total effect" if some and top["total_effect"] > 0 else ""
    interval = "" if pd.isna(top["low"]) else f", 95% interval {number(top['low'])} to {number(top['high'])}"
    if some:
        verb = "takes away most" if needed else "brings back most"
    else:
        verb = "takes nothing away, and no other does" if needed else "brings nothing back, and no other does"
    text = f"{_name(top, keys)} {verb}: {number(top['aie'])} ({interval.removeprefix(', ') or 'no interval'}{share})."
    text += _ties(ranked)
    sure = int(((ranked["low"] > 0) | (ranked["high"] < 0)).sum())
    if ranked["low"].notna().any():
        text += f" {sure} of {counted(len(ranked), 'effect')} have an interval that excludes zero."
    kinds = effects.table["kind"].nunique()
    if kinds > 1:
        means = effects.aie(by="kind").sort_values("aie", ascending=needed)
        listed = ", ".join(
            f"{KIND_NAMES.get(row['kind'], row['kind'])} {number(row['aie'])}" for _, row in means.iterrows()
        )
        text += f" Mean effect of one site by kind: {listed}."
    return text


def _ties(ranked: pd.DataFrame) -> str:
    if ranked["rank_low"].isna().all():
        return ""
    tied = int(ranked["tied_with_first"].sum()) - 1
    if tied == 0:
        return " No other is tied with it: every paired difference from it excludes zero."
    return f" {counted(tied, 'other')} cannot be told apart from it by these prompts."


def _name(row: pd.Series, keys: list[str]) -> str:
    name = str(row["site"]) if "site" in keys else " ".join(str(row[key]) for key in keys)
    if "token_role" in keys and "site" in keys and row["token_role"] not in ("all", ""):
        name += f" at {str(row['token_role']).replace('_', ' ')}"
    if "step_start" in keys:
        name += f" in {steps_label(int(row['step_start']), int(row['step_stop']))}"
    return name


def _how_sure(effects: Findings) -> str:
    prompts = effects.table["prompt_id"].nunique()
    if prompts == 1:
        return (
            "How sure: one prompt, so there are no intervals and nothing here says what another prompt would show. "
            "Seeds and noise samples are replicates of it, not further observations."
        )
    few = " That is few: the intervals are rough, and sites that are really different may look tied."
    return (
        f"How sure: intervals are 95% bootstraps over {prompts} prompts (seeds and noise samples are averaged within a "
        f"prompt).{few if prompts < FEW_PROMPTS else ''} They hold for each effect by itself; among many sites some "
        "exclude zero by chance."
    )
