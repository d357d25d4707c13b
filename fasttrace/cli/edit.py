"""``fasttrace edit``: fit, apply, make pictures before and after, judge, save."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import EditError
from .console import check_out

if TYPE_CHECKING:
    from ..edit.edit import Edit
    from ..edit.judge import Case, Judgement, Reader

_MANY = ". Repeat for several."


def edit(
    concept: Annotated[
        list[str], typer.Argument(help='"old=new": what the old words are to be read as' + _MANY, show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="emoji (packaged), a folder saved by diffusers, a hub id, or random:tiny-sd15.")
    ] = "emoji",
    preserve: Annotated[
        list[str] | None, typer.Option(help="Words that keep their meaning" + _MANY, show_default=False)
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Prompts that keep their meaning, one a line; a few hundred. The packaged model has its own.",
            show_default=False,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="quickfix: one text projection; memit: several; time, uce, locoedit, rece: cross-attention."),
    ] = "quickfix",
    mode: Annotated[str, typer.Option(help="corrected, or release: as Diff-QuickFix's released code.")] = "corrected",
    site: Annotated[
        list[str] | None,
        typer.Option(help="What to edit, if not the method's own: a site or glob" + _MANY, show_default=False),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='Sentences to fit in, such as "a photo of {}"' + _MANY, show_default=False),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="subject_last, subject_last_to_end or aligned, if not the method's own.", show_default=False),
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="Weight of staying as it was, if not the method's own.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the edit, the pictures and the table.")] = Path("edit"),
    lora: Annotated[bool, typer.Option("--lora", help="Also write a LoRA file that diffusers loads.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds of the pictures: 0,1 or 0-3.")] = "0-3",
    prompts: Annotated[int, typer.Option(help="Packaged model: prompts of each kind to judge by.", min=1)] = 6,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(help="Other models: prompts that should not change" + _MANY, show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Other models: a CLIP, folder or hub id, to read pictures with.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance: 3 for the packaged model, else 7.5.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, ...; the GPU if there is one.", show_default=False)
    ] = None,
) -> None:
    """Change what a prompt means, in closed form, in seconds.

    The edit is fitted from the words alone: no pictures, no training. Then the same prompts and seeds are drawn before
    and after it, and read by a judge that the edit cannot touch. Efficacy: the old concept is gone. Specificity:
    unrelated prompts look as before.
    """
    from rich.console import Console

    from ..edit import fit_edit
    from ..edit.cases import emoji_attribute, emoji_captions
    from ..edit.edit import RECIPE_FILE
    from ..edit.export import LORA_FILE, export_lora
    from ..edit.grid import save_grid
    from ..edit.judge import judge as judge_edit
    from ..pipeline import load_pipeline
    from .study import check_device, numbers

    console = Console(width=110)
    concepts = dict(_split(entry) for entry in concept)
    packaged = model == "emoji"
    if captions is not None:
        kept = [line for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        kept = emoji_captions() if packaged and mode == "corrected" else []
    chosen_seeds = numbers(seeds, "--seeds")
    _check_numbers(out, guidance=guidance, ridge=ridge)
    if packaged:
        for old, new in concepts.items():  # the judge must know the words before anything is written
            emoji_attribute(old, new)
    check_device(device)
    pipe = load_pipeline(model, device=device)
    fitted = fit_edit(
        pipe,
        concepts,
        template,
        ridge=ridge,
        mode=mode,
        method=method,
        site=site,
        positions=positions,  # type: ignore[arg-type]
        preserve=preserve or (),
        captions=kept,
    )
    if (out / RECIPE_FILE).is_file():  # an earlier edit's LoRA would pass for this one's
        (out / LORA_FILE).unlink(missing_ok=True)
    fitted.save(out)
    console.print(_describe(fitted))
    if lora:
        console.print(f"LoRA: {export_lora(fitted, out)}")
    if not packaged and judge is None:
        console.print(
            f"Saved in {out}. To see what it does to pictures, name a CLIP: --judge openai/clip-vit-base-patch32"
        )
        return
    for old, new in concepts.items():
        cases, reader, scorer = _court(pipe, packaged, judge, old, new, prompts, list(preserve or ()), unrelated)
        judgement = judge_edit(
            pipe,
            fitted,
            cases,
            reader,
            seeds=chosen_seeds,
            scorer=scorer,
            num_inference_steps=steps,
            guidance_scale=(3.0 if packaged else 7.5) if guidance is None else guidance,
        )
        name = "".join(letter if letter.isalnum() else "_" for letter in old)
        judgement.table.to_csv(out / f"{name}.csv", index=False)
        grid = save_grid(judgement, out / f"{name}.png")
        console.print(_report(judgement, old, new))
        console.print(
            f"efficacy {judgement.efficacy:.0%}: {old!r} is gone from pictures of target prompts and paraphrases\n"
            f"specificity {judgement.specificity:.0%}: unrelated pictures are read as before\n"
            f"pictures: {grid}"
        )


def _check_numbers(out: Path, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise EditError(f"--{name} {value}: expected a finite number")
    check_out(out)


def _split(entry: str) -> tuple[str, str]:
    old, equals, new = entry.partition("=")
    if not equals or not old.strip() or not new.strip():
        raise EditError(f'{entry!r}: expected "old=new", such as "striped style=flat style"')
    return old.strip(), new.strip()


def _court(
    pipe: Any,
    packaged: bool,
    clip: str | None,
    old: str,
    new: str,
    number: int,
    neighbours: list[str],
    unrelated: list[str] | None,
) -> tuple[list[Case], Reader, Any]:
    """Cases, the reader of their pictures, and the scorer."""
    from ..edit.cases import emoji_attribute, emoji_cases, worded_cases
    from ..edit.judge import AttributeReader, ScoreReader
    from ..metrics.scorers import find_scorer

    if packaged:
        from ..zoo import emoji

        reader = AttributeReader(emoji.load_judge().read, emoji_attribute(old, new), old, new)
        return emoji_cases(old, new, number), reader, emoji.load_scorer()
    cases = worded_cases(old, new, neighbours, unrelated) if unrelated else worded_cases(old, new, neighbours)
    scorer = find_scorer(pipe, clip or "")
    texts = [text for case in cases for text in (case.text, case.wanted) if text]
    return cases, ScoreReader(scorer, texts), scorer


def _describe(edit: Edit) -> str:
    recipe = edit.recipe
    where = recipe.matrices[0] if len(recipe.matrices) == 1 else f"{len(recipe.matrices)} matrices"
    return (
        f"{recipe.method} ({recipe.mode}), ridge {recipe.ridge:g}: rank {edit.rank} in {where}, "
        f"{edit.parameters:,} weights; held back by {len(recipe.captions)} captions"
    )


def _report(judgement: Judgement, old: str, new: str) -> Any:
    from rich.table import Table

    shares = {
        "gone_before": "old gone, before",
        "gone_after": "old gone, after",
        "became": "new there",
        "changed": "changed",
    }
    scores = {"clip_before": "CLIP before", "clip_after": "CLIP after", "clip_wanted": "CLIP with new"}
    summary = judgement.summary()
    known = [name for name in (*shares, *scores) if name in summary]
    table = Table(
        "prompts", "pictures", *((shares | scores)[name] for name in known), title=f"{old} -> {new}", box=None
    )
    for _, row in summary.iterrows():
        cells = [
            "" if row[name] != row[name] else f"{row[name]:.0%}" if name in shares else f"{row[name]:.1f}"
            for name in known
        ]
        table.add_row(str(row["about"]), str(int(row["pictures"])), *cells)
    return table
