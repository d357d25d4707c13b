"""Effects, as a study returns them: what was found, which can also be said in words and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import plot
from ..findings.findings import Findings
from ..findings.summary import summarize


class Effects(Findings):
    """What a study found: a table and its record, the statistics of `Findings`, in words and in pictures.

    Raises:
        StudyError: a column is missing, or the table is empty.
    """

    def summary(self, by: str | Sequence[str] | None = None) -> str:
        """In words: what was found, and how sure it is."""
        return summarize(self, by)

    def heatmap(self, path: str | Path, **options: Any) -> Path:
        """Write a picture of the effects: token x layer for text sites, sites in network order for the UNet.

        Args:
            path: of a PNG, SVG or PDF.
            options: of `fasttrace.plot.heatmap`.
        """
        return plot.heatmap(self, path, **options)
