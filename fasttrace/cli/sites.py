"""``fasttrace sites``: what can be traced in a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .console import console
from .study import Model


def sites(
    model: Model,
    pattern: Annotated[
        str, typer.Argument(help="unet, text, all, a name, or a glob such as 'unet.up_blocks.*.attn1'.")
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for programs.")] = False,
) -> None:
    """List the sites of a model: the modules whose output can be traced, in execution order."""
    from rich.table import Table

    from ..findings.wording import counted
    from ..pipeline import load_pipeline
    from ..sites import discover_sites, select_sites

    pipe = load_pipeline(model, device="meta" if model.startswith("random:") else "cpu")
    chosen = select_sites(discover_sites(pipe), pattern)
    if as_json:
        rows = [
            {"site": site.name, "part": site.part, "kind": site.kind, "layer": site.layer,
             "module": type(site.module).__name__}
            for site in chosen
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("site", "part", "kind", "layer", "module", box=None, header_style="bold", pad_edge=False)
    for site in chosen:
        table.add_row(site.name, site.part, site.kind, str(site.layer), type(site.module).__name__)
    terminal = console()
    terminal.print(table)
    terminal.print(f"\n{counted(len(chosen), 'site')}")
