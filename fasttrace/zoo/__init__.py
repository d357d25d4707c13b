"""Models to trace without a download: the packaged emoji model, and random pipelines of the true architectures."""

from __future__ import annotations

from .random_pipeline import ARCHITECTURES, random_pipeline

__all__ = ["ARCHITECTURES", "random_pipeline"]
