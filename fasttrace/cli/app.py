"""The shell: ``fasttrace demo | sites | plan | sweep | report | edit | profile | tune``, a file a verb.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core

from ..errors import FasttraceError
from .console import say_error
from .demo import demo
from .edit import edit
from .plan import plan
from .profile import profile
from .report import report
from .sites import sites
from .sweep import sweep
from .tune import tune


class _Group(typer.core.TyperGroup):
    """The commands, with errors that a caller can act on turned into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notices; errors still come through
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        # Threads that spin while they wait starve each other where the cores are shared: 24 x slower for one UNet call
        # of 64 rows on two busy cores. Read when torch is imported, and the user's own setting wins.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            return super().invoke(ctx)
        except (FasttraceError, OSError) as error:
            say_error(" ".join(str(error).split()).replace("overwrite=True", "--overwrite"))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say_error("interrupted; what was finished is kept, and the same command goes on from there")
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

for _verb in (demo, sites, plan, sweep, report, edit, profile, tune):
    app.command()(_verb)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fasttrace {version('fasttrace')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say the version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The ``fasttrace`` command."""
    app()
