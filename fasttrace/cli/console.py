"""Where the commands write: standard output, and one line of standard error."""

from __future__ import annotations

import sys
from typing import Any


def console() -> Any:
    """Standard output; wide enough for whole site names where it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def say_error(text: str) -> None:
    from rich.console import Console

    terminal = Console(stderr=True, highlight=False)
    terminal.print("[bold red]error:[/bold red] ", end="")
    terminal.print(text, markup=False, soft_wrap=True)
