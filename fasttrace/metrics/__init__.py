"""Metrics: one number a run, higher for closer to clean."""

from .metrics import Metric, Needs, PictureMetric, RunBatch, resolve_metrics, served_names
from .scorers import HubClip, Scorer, clip_scores, find_scorer

__all__ = [
    "HubClip",
    "Metric",
    "Needs",
    "PictureMetric",
    "RunBatch",
    "Scorer",
    "clip_scores",
    "find_scorer",
    "resolve_metrics",
    "served_names",
]
