"""``fasttrace profile``: where the time of a trace goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def profile(
    model: Annotated[str, typer.Argument(help='"emoji", "random:sd15", a diffusers folder, or a hub id.')] = "emoji",
    sites: Annotated[list[str] | None, typer.Option(help="UNet sites to sweep: names or globs.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the study that is estimated.")] = 20,
    prompts: Annotated[int, typer.Option(help="Its prompts.")] = 1,
    seeds: Annotated[int, typer.Option(help="Its seeds.")] = 1,
    budget: Annotated[float, typer.Option(help="Seconds to spend on measuring, about.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json and profile.png.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Also write a torch.profiler trace of one UNet call here.")] = None,
) -> None:
    """Say where the time of a trace goes on this machine, and what a study will take.

    Every number is measured here and now, beside the machine's own matrix-product rate and copy bandwidth.
    """
    from rich.console import Console

    from ..pipeline import load_pipeline
    from ..profile import profile as measure
    from ..profile.show import print_profile
    from ..profile.torch_trace import write_trace

    pipe = load_pipeline(model)
    patterns: Any = sites or "unet"
    measured = measure(pipe, patterns, model=model, steps=steps, prompts=prompts, seeds=seeds, budget=budget)
    console = Console()
    print_profile(measured, console)
    if out is not None:
        measured.save(out)
        console.print(f"Written: {out / 'profile.json'}, {out / 'profile.png'}")
    if trace is not None:
        write_trace(pipe, measured.best.batch, trace)
        console.print(f"Written: {trace} (open it in a Chrome trace viewer)")
