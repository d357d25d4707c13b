"""Where the commands write: standard output, and one line of standard error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import StudyError


def console() -> Any:
    """Standard output; wide enough for whole site names where it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def check_out(folder: Path) -> None:
    """Refuse ``--out ""``, which would be the working folder."""
    if folder == Path():
        raise StudyError("--out is empty or the working folder itself: name a folder, such as --out trace")


def say_error(text: str) -> None:
    from rich.console import Console

    terminal = Console(stderr=True, highlight=False)
    terminal.print("[bold red]error:[/bold red] ", end="")
    terminal.print(text, markup=False, soft_wrap=True)
