"""Closed-form edits of text encoders and cross-attention: fit, apply, revert, save, sweep, judge."""

from __future__ import annotations

from .edit import Edit, Recipe, load_edit
from .export import export_lora, export_pipeline
from .fit import METHODS, combine, fit_edit
from .keys import key_gram
from .matrices import Matrix, list_matrices, select_matrices
from .ridge import Prior
from .sweep import edited_pictures, edited_states, fit_candidates, row_edits
from .update import Applied, Update

__all__ = [
    "METHODS",
    "Applied",
    "Edit",
    "Matrix",
    "Prior",
    "Recipe",
    "Update",
    "combine",
    "edited_pictures",
    "edited_states",
    "export_lora",
    "export_pipeline",
    "fit_candidates",
    "fit_edit",
    "key_gram",
    "list_matrices",
    "load_edit",
    "row_edits",
    "select_matrices",
]
