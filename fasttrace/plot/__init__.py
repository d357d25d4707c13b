"""Figures of effects. Nothing here needs a display, or changes matplotlib's settings."""

from __future__ import annotations

from pathlib import Path

from ..errors import StudyError
from ..findings.findings import Findings
from ..findings.table import is_text
from ..findings.wording import KIND_NAMES, counted, unit
from . import style
from .pictures import Picture, picture_grid

__all__ = ["Picture", "heatmap", "picture_grid", "profile", "ranked"]


def heatmap(effects: Findings, path: str | Path, *, metric: str | None = None, title: str | None = None) -> Path:
    """Draw where the effects are: token x layer for text sites, sites in network order (or x steps) for the UNet.

    Args:
        effects: of text sites, UNet sites, or both, which are drawn one above the other.
        path: of a PNG, SVG or PDF; its folder is made.
        metric: which one to draw; the table's first if not given.
        title: over the figure; the prompt, or the number of prompts, if not given.

    Returns:
        The path.
    """
    from .bars import SHOWN, draw_ranked
    from .text import draw_text, rows_shown
    from .unet import draw_sites, draw_steps

    chosen = _chosen(effects, metric)
    unet, text = chosen.table["part"] == "unet", is_text(chosen.table)
    single = chosen.table["kind"].isin(list(KIND_NAMES))
    parts = []
    if (text & single).any():
        parts.append((draw_text, 2.2 + 0.24 * rows_shown(chosen)))
    if (unet & single).any():
        sites = chosen.table[unet & single]
        if sites["step_start"].nunique() > 1 or sites["step_stop"].nunique() > 1:
            parts.append((draw_steps, 2.2 + 0.2 * sites.groupby("kind")["site"].nunique().max()))
        else:
            parts.append((draw_sites, 1.2 + 1.5 * sites["kind"].nunique()))
    if not ((text | unet) & single).all():
        parts.append((draw_ranked, 1.2 + 0.24 * min(SHOWN, chosen.table["site"].nunique())))
    fig = style.figure(12, sum(height for _, height in parts) + 1.0)
    panels = fig.subfigures(len(parts), 1, height_ratios=[height for _, height in parts], squeeze=False)[:, 0]
    for (draw, _), panel in zip(parts, panels, strict=True):
        draw(panel, chosen)
    style.heading(fig, title or _title(chosen), _explanation(chosen))
    return style.save(fig, path)


def profile(effects: Findings, path: str | Path, *, metric: str | None = None, title: str | None = None) -> Path:
    """Draw the mean effect of one site against depth, a line a kind.

    Args and result are those of `heatmap`.
    """
    from .unet import draw_profile

    chosen = _chosen(effects, metric)
    panels = int((chosen.table["part"] != "unet").any()) + int((chosen.table["part"] == "unet").any())
    fig = style.figure(5.0 + 5.0 * panels, 4.6)
    draw_profile(fig, chosen)
    count = chosen.table["prompt_id"].nunique()
    bands = "Bands are 95% intervals over prompts. " if count > 1 else "One prompt, so no intervals. "
    style.heading(fig, title or f"Where a site matters, by depth: {_whose(chosen)}", f"{bands}{_units(chosen)}")
    return style.save(fig, path)


def ranked(effects: Findings, path: str | Path, *, metric: str | None = None, title: str | None = None) -> Path:
    """Draw the strongest sites as bars with their intervals.

    Args and result are those of `heatmap`.
    """
    from .bars import SHOWN, draw_ranked

    chosen = _chosen(effects, metric)
    fig = style.figure(11, 2.0 + 0.26 * min(SHOWN, len(chosen.aie(by=["site", "token_role"], resamples=2))))
    draw_ranked(fig, chosen)
    style.heading(fig, title or f"The strongest sites: {_whose(chosen)}", _units(chosen))
    return style.save(fig, path)


def _chosen(effects: Findings, metric: str | None) -> Findings:
    """The rows of one metric; refused where they differ in anything else that an effect's meaning depends on."""
    chosen = effects.where(metric=metric or effects.table["metric"].iloc[0])
    several = [name for name in chosen.meaning() if name != "metric"]
    if several:
        name = several[0]
        values = ", ".join(str(value) for value in chosen.table[name].unique())
        raise StudyError(f"a figure shows one {name}, and there are {values}: choose with effects.where({name}=...)")
    return chosen


def _title(effects: Findings) -> str:
    restoring = effects.table["base"].iloc[0] == "corrupted"
    verb = "What restoring one site brings back" if restoring else "What corrupting one site takes away"
    return f"{verb}: {_whose(effects)}"


def _whose(effects: Findings) -> str:
    prompts = effects.table["prompt_id"].nunique()
    if prompts == 1:
        row = effects.table.iloc[0]
        return f"“{row['prompt']}”, subject “{row['subject']}”"
    return f"mean of {prompts} prompts"


def _units(effects: Findings) -> str:
    metric = effects.table["metric"].iloc[0]
    return f"Scores: {metric}, {unit(metric)}." if unit(metric) != metric else f"Scores: {metric}."


def _explanation(effects: Findings) -> str:
    text = (
        "Corrupted: noise on the subject's token embeddings. Clean: no noise. A darker cell, or a bar whose end is "
        "closer to the line of the clean run, is nearer to it."
    )
    star = " ★ marks the subject's tokens." if (effects.table["part"] != "unet").any() else ""
    seeds = effects.table.groupby("prompt_id")["seed"].nunique().max()
    samples = effects.table["noise_sample"].nunique()
    counts = f" {counted(seeds, 'seed')}, {counted(samples, 'noise sample')}."
    return f"{text}{star}\n{_units(effects)}{counts}"
