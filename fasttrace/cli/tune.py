"""``fasttrace tune``: which implementations were chosen on the user's card, and forgetting them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import console


def tune(
    forget: Annotated[bool, typer.Option("--forget", help="Drop what is kept: the next run measures anew.")] = False,
) -> None:
    """Show the implementations chosen by measurement on your card, which every run keeps to."""
    import torch
    from rich.table import Table

    from ..findings.wording import counted
    from ..ops import tuning

    terminal = console()
    if not torch.cuda.is_available():
        terminal.print("No CUDA card here: nothing is chosen or measured on a CPU.", soft_wrap=True)
    kept: dict[str, Any] = tuning.stored()
    path = tuning.cache_path()
    number = sum(len(choices) for choices in kept.values() if isinstance(choices, dict))
    if forget:
        tuning.forget()
        terminal.print(
            f"Forgot {counted(number, 'choice')} of {path}; the next run on a card measures anew.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    if not number:
        terminal.print(f"No choices are kept in {path}.", highlight=False, markup=False, soft_wrap=True)
        return
    for card, choices in kept.items():
        if not isinstance(choices, dict):
            continue
        terminal.print(card, highlight=False, markup=False, soft_wrap=True)
        table = Table("op, shapes, dtype", "runs as", "microseconds", box=None, header_style="bold", pad_edge=False)
        for key, found in sorted(choices.items()):
            times = ", ".join(f"{name} {took:g}" for name, took in found.get("us", {}).items())
            table.add_row(key, str(found.get("implementation")), times)
        terminal.print(table)
    terminal.print(f"\n{counted(number, 'choice')} in {path}", highlight=False, markup=False, soft_wrap=True)
