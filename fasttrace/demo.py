"""``fasttrace demo``: a causal trace from start to end, for someone who has never heard of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .effects.effects import Effects
from .findings.wording import counted, number
from .prompts import Prompt
from .report.terminal import ranking

CANDIDATES = (
    ("a pizza in flat style", "pizza"),
    ("a blue rocket in flat style", "rocket"),
    ("a photo of a sunflower in flat style", "sunflower"),
    ("a snowman in outline style", "snowman"),
    ("a red house in mosaic style", "house"),
    ("a photo of a green cactus in striped style", "cactus"),
)
SEEDS = 2

_WHAT = """A text-to-image model turns a prompt into a picture in many small parts: layers of a text encoder, then \
attention, MLP and resnet modules of a UNet, run again at every denoising step. Which of them carry the subject of the \
prompt? [bold]Causal tracing[/bold] asks each one in turn, with three kinds of run from the same random start:

  [bold]clean[/bold]      the prompt as it is
  [bold]corrupted[/bold]  noise on the embeddings of the subject's words, so that the model no longer knows what to draw
  [bold]restored[/bold]   corrupted, but the output of one module (a [bold]site[/bold]) is copied from the clean run

If the subject comes back, that site carried it. A score says how much came back; the difference from the corrupted \
run is the site's [bold]indirect effect[/bold], and clean minus corrupted is the [bold]total effect[/bold]."""


def run_demo(out: Path, model: str, seed: int, steps: int, console: Any) -> None:
    """Load a model, choose a prompt that it draws well, trace every site, and say what was found.

    Args:
        out: folder for pictures, ``effects.parquet``, ``study.json`` and the report.
        model: as for `fasttrace.load_pipeline`.
        seed: first of the two seeds.
        steps: denoising steps.
        console: of rich.
    """
    from . import plot
    from .pipeline import load_pipeline
    from .report import report
    from .study.presets import default_metrics
    from .study.run import run
    from .study.study import Study

    started = time.monotonic()
    console.rule("What is causal tracing?")
    console.print(_WHAT, highlight=False)
    console.rule("1. The model")
    pipe = load_pipeline(model)
    metrics = default_metrics(model, "free")
    settings: dict[str, Any] = {
        "seeds": [seed + i for i in range(SEEDS)],
        "metrics": metrics,
        "num_inference_steps": steps,
    }
    millions = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    console.print(f"{model}: {type(pipe).__name__}, a UNet of {number(millions)} million parameters.", highlight=False)

    console.rule("2. A prompt that the model draws well")
    prompt = _choose(pipe, settings, console)
    study = Study(pipe, [prompt], sites="all", positions="tokens", **settings)

    console.rule("3. The trace")
    console.print(
        f"Restoring {counted(len(study.site_sets), 'site')} one at a time: each UNet module at all {study.step_count} "
        f"steps, each text layer at each token. Scores: {', '.join(metrics)}.\n{study.plan().summary()}",
        highlight=False,
    )
    effects = run(study, out=out, overwrite=True)

    console.rule("4. What was found")
    metric = metrics[0]
    for part, rows in _parts(effects.where(metric=metric)):
        console.print(f"\n[bold]{part}[/bold]")
        console.print(ranking(rows, shown=5))
        console.print(rows.summary(), highlight=False, markup=False)
        plot.heatmap(rows, out / f"{part.replace(' ', '_').lower()}.png")
    page = report(out)
    grid = page.parent / "pictures-1.png"
    if grid.is_file():
        (out / "pictures.png").write_bytes(grid.read_bytes())

    console.rule("5. Look")
    _list_files(out, page, console)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. To trace a prompt of your own:", highlight=False)
    command = f'fasttrace sweep {model} --prompt "{prompt.text}" --subject {prompt.subject!r} --seeds 0-3 --out mine'
    console.print(f"  {command}", highlight=False, soft_wrap=True)


def _choose(pipe: Any, settings: dict[str, Any], console: Any) -> Prompt:
    """The candidate whose picture loses most by corruption; only clean and corrupted runs."""
    from rich.table import Table

    from .study.screening import screen
    from .study.study import Study

    console.print(
        "Only a subject that the model can draw, and that noise takes away, can be brought back. So a few prompts are "
        "drawn clean and corrupted first, and the one that loses most is traced.",
        highlight=False,
    )
    prompts = [Prompt(text, subject) for text, subject in CANDIDATES]
    _, found = screen(Study(pipe, prompts, sites="unet", **settings), min_clean=float("-inf"))
    table = Table("prompt", "subject", "clean", "corrupted", "total effect", box=None, header_style="bold")
    scores = []
    for prompt in prompts:
        pairs = [pair for pair in found.pairs if pair.prompt_id == prompt.id]
        clean, corrupted = _mean([pair.clean for pair in pairs]), _mean([pair.corrupted for pair in pairs])
        scores.append(clean - corrupted)
        table.add_row(prompt.text, prompt.subject, *map(number, (clean, corrupted, clean - corrupted)))
    console.print(table)
    best = prompts[scores.index(max(scores))]
    console.print(f"\nTraced: [bold]{best.text}[/bold], subject [bold]{best.subject}[/bold].", highlight=False)
    return best


def _parts(effects: Effects) -> list[tuple[str, Effects]]:
    return [
        ("UNet", effects.where(part="unet")),
        ("Text encoder", effects.where(part=[part for part in effects.table["part"].unique() if part != "unet"])),
    ]


def _list_files(out: Path, page: Path, console: Any) -> None:
    from rich.table import Table

    about = {
        "pictures.png": "clean, corrupted and restored pictures, with their scores",
        "unet.png": "every UNet site in network order, a panel a kind; nearer to the dashed line is nearer to clean",
        "text_encoder.png": "token by layer; darker is nearer to the clean run, and ★ marks the subject",
        "effects.parquet": "the table of effects, one row a run and metric",
        "study.json": "everything needed to repeat the study",
    }
    table = Table(box=None, show_header=False)
    for name, text in about.items():
        if (out / name).is_file():
            table.add_row(str(out / name), text)
    table.add_row(str(page), "all of it on one page, to open in a browser")
    console.print(table)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
