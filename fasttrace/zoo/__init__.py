"""Models to trace without a download: the packaged emoji model, and random pipelines of the true architectures."""

from __future__ import annotations

from .architectures import ARCHITECTURES
from .random_pipeline import random_pipeline

__all__ = ["ARCHITECTURES", "random_pipeline"]
