"""``fasttrace sweep``: run a study and say what was found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ..errors import StudyError
from .console import check_out, console
from .study import Request, takes_study


@takes_study
def sweep(
    request: Request,
    out: Annotated[
        Path,
        typer.Option(help="Folder for effects.parquet, study.json, pictures and the report.", rich_help_panel="Run"),
    ] = Path("trace"),
    engine: Annotated[
        str, typer.Option(help="fast, or oracle (plain hooks, one run at a time).", rich_help_panel="Run")
    ] = "fast",
    max_batch: Annotated[
        int | None, typer.Option(help="Most rows of one UNet call.", min=1, show_default=False, rich_help_panel="Run")
    ] = None,
    min_clean: Annotated[
        float | None,
        typer.Option(help="Drop (prompt, seed) pairs whose clean score is below.", show_default=False,
                     rich_help_panel="Run"),
    ] = None,
    max_corrupted: Annotated[
        float | None,
        typer.Option(help="Drop pairs whose corrupted score is above.", show_default=False, rich_help_panel="Run"),
    ] = None,
    pictures: Annotated[
        int, typer.Option(help="Keep pictures of this many strongest and weakest sites.", min=0, rich_help_panel="Run")
    ] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.", rich_help_panel="Run")] = False,
) -> None:  # fmt: skip
    """Run a study: clean, corrupted, and restored at every site, with progress; then say what was found.

    An interrupted sweep goes on where it stopped when the same command is given again.

    Example: fasttrace sweep emoji --prompt "a red owl in flat style" --subject owl --seeds 0-3 --out owl
    """
    from ..report import report
    from ..report.terminal import show_effects
    from ..study.run import run
    from ..study.screening import screen

    check_out(out)
    for name, limit in (("--min-clean", min_clean), ("--max-corrupted", max_corrupted)):
        if limit is not None and not math.isfinite(limit):
            raise StudyError(f"{name} {limit}: expected a finite number")
    terminal = console()
    study = request.study()
    terminal.print(f"{request.describe()}{study.plan().summary()}\n", highlight=False, soft_wrap=True)
    if min_clean is not None or max_corrupted is not None:
        study, found = screen(
            study, min_clean=min_clean, max_corrupted=max_corrupted, engine=engine, max_batch=max_batch
        )
        terminal.print(found.summary(), highlight=False, soft_wrap=True)
    effects = run(study, engine, out, max_batch=max_batch, pictures=pictures, overwrite=overwrite)
    show_effects(effects, terminal)
    terminal.print(f"\nReport: {report(out)}", highlight=False, soft_wrap=True)
