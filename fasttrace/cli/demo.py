"""``fasttrace demo``: a trace from start to end, explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, tables and the report.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Another model than the packaged one.")] = "emoji",
    seed: Annotated[int, typer.Option(help="First seed of the pictures.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
) -> None:
    """Trace a small trained model and explain every step; some minutes on a laptop, no download."""
    from ..demo import run_demo

    run_demo(out, model, seed, steps, console())
