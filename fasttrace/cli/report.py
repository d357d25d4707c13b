"""``fasttrace report``: the page of a finished sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished sweep.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; FOLDER/report if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a report of a finished sweep: one page with words, figures, tables and the record."""
    from ..report import report as write_report

    console().print(f"Report: {write_report(folder, out)}", highlight=False, soft_wrap=True)
