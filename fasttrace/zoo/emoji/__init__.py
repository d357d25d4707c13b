"""The packaged model: Stable Diffusion in miniature, trained on captioned emoji art, with its scorer and its judge."""

from __future__ import annotations

from .judge import Judge, load_judge
from .model import Scorer, load, load_scorer

__all__ = ["Judge", "Scorer", "load", "load_judge", "load_scorer"]
