"""The shell: ``fasttrace demo | sites | plan | sweep | report | edit | profile``.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ..errors import FasttraceError, ModelError
from .study import Request, takes_study

# Commands that live with what they do: module, its command, and the line that --help shows without importing it.
_ELSEWHERE = {
    "edit": ("fasttrace.cli.edit", "edit_command", "Change what a prompt means, in closed form, in seconds."),
    "profile": ("fasttrace.profile", "profile_command", "Say where the time of a trace goes on this machine."),
}


class _Elsewhere(typer.core.TyperCommand):
    """A command whose module is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module, attribute, _ = _ELSEWHERE[str(self.name)]
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise ModelError(f"`fasttrace {self.name}` cannot be loaded: {error}") from error
        if not isinstance(command, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(self.name)(command)
            command = app
        return typer.main.get_command(command).make_context(info_name, args, parent=parent, **extra)


class _Group(typer.core.TyperGroup):
    """The commands, with errors that a caller can act on turned into one line and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, _, about) in _ELSEWHERE.items():
            self.add_command(_Elsewhere(name=name, help=about, callback=lambda: None))

    def invoke(self, ctx: Any) -> Any:
        for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notices; errors still come through
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        # Threads that spin while they wait starve each other where the cores are shared: 24 x slower for one UNet call
        # of 64 rows on two busy cores. Read when torch is imported, and the user's own setting wins.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            return super().invoke(ctx)
        except (FasttraceError, OSError) as error:
            _say_error(" ".join(str(error).split()))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say_error("interrupted; what was finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Causal tracing of text-to-image diffusion models: which parts of a model bring a noised-out subject back?\n\n"
    "New here? Run [bold]fasttrace demo[/bold]: it explains itself, and leaves pictures.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="emoji (packaged), a folder saved by diffusers, a hub id, or random:tiny-sd15 (random weights).",
        show_default=False,
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, tables and the report.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Another model than the packaged one.")] = "emoji",
    seed: Annotated[int, typer.Option(help="First seed of the pictures.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
) -> None:
    """Trace a small trained model and explain every step; some minutes on a laptop, no download."""
    from ..demo import run_demo

    run_demo(out, model, seed, steps, _console())


@app.command()
def sites(
    model: Model,
    pattern: Annotated[
        str, typer.Argument(help="unet, text, all, a name, or a glob such as 'unet.up_blocks.*.attn1'.")
    ] = "all",
) -> None:
    """List the sites of a model: the modules whose output can be traced, in execution order."""
    from rich.table import Table

    from ..findings.wording import counted
    from ..pipeline import load_pipeline
    from ..sites import discover_sites, select_sites

    pipe = load_pipeline(model, device="meta" if model.startswith("random:") else "cpu")
    chosen = select_sites(discover_sites(pipe), pattern)
    table = Table("site", "part", "kind", "layer", "module", box=None, header_style="bold", pad_edge=False)
    for site in chosen:
        table.add_row(site.name, site.part, site.kind, str(site.layer), type(site.module).__name__)
    console = _console()
    console.print(table)
    console.print(f"\n{counted(len(chosen), 'site')}")


@app.command()
@takes_study
def plan(request: Request) -> None:
    """Say what a sweep would cost, without running it: runs, UNet forwards beside the naive count, memory."""
    study = request.study()
    _console().print(f"{request.describe()}{study.plan().summary()}", highlight=False, soft_wrap=True)


@app.command()
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

    console = _console()
    study = request.study()
    console.print(f"{request.describe()}{study.plan().summary()}\n", highlight=False, soft_wrap=True)
    if min_clean is not None or max_corrupted is not None:
        study, found = screen(
            study, min_clean=min_clean, max_corrupted=max_corrupted, engine=engine, max_batch=max_batch
        )
        console.print(found.summary(), highlight=False, soft_wrap=True)
    effects = run(study, engine, out, max_batch=max_batch, pictures=pictures, overwrite=overwrite)
    show_effects(effects, console)
    console.print(f"\nReport: {report(out)}", highlight=False, soft_wrap=True)


@app.command(name="report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished sweep.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; FOLDER/report if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a report of a finished sweep: one page with words, figures, tables and the record."""
    from ..report import report

    _console().print(f"Report: {report(folder, out)}", highlight=False, soft_wrap=True)


def main() -> None:
    """The ``fasttrace`` command."""
    app()


def _console() -> Any:
    """Standard output; wide enough for whole site names where it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _say_error(text: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(text, markup=False, soft_wrap=True)
