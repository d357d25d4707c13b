"""How much memory a repeated call takes."""

from __future__ import annotations

from collections.abc import Callable

from fasttrace.profile.live import LiveBytes


def most_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that the second of two equal calls holds at once; plans stay from the first."""
    run()
    with LiveBytes() as live:
        run()
    return live.peak
