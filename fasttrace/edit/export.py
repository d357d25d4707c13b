"""Handing an edit on: a whole edited pipeline in diffusers' layout, or a LoRA file that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sites import TEXT_PARTS
from .edit import Edit

LORA_FILE = "pytorch_lora_weights.safetensors"


def export_pipeline(edit: Edit, pipe: Any, folder: str | Path) -> Path:
    """Save the whole pipeline, with the edit in its weights, as ``DiffusionPipeline.from_pretrained`` reads it.

    Raises:
        EditError: an edit for another model.
    """
    with edit.applied(pipe):
        pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def export_lora(edit: Edit, folder: str | Path) -> Path:
    """Save the edit as a LoRA of the update's own rank, for ``pipe.load_lora_weights(folder)``; returns the file.

    No ``alpha`` is written, so that the scale is 1 and the LoRA equals the edit.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for update in edit.updates:
        down, up = _names(update.name)
        tensors[f"{down}.weight"] = update.right.T.clone(memory_format=torch.contiguous_format).cpu()
        tensors[f"{up}.weight"] = update.left.contiguous().cpu()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / LORA_FILE, metadata={"format": "pt"})
    return folder / LORA_FILE


def _names(matrix: str) -> tuple[str, str]:
    """Where diffusers looks for the two factors of a matrix.

    It knows an MLP's LoRA in a text encoder only by the spelling that its own training scripts use there. It drops
    ``text_model`` where transformers no longer has it, and does not add it where transformers still has it.
    """
    part, _, path = matrix.partition(".")
    if part not in TEXT_PARTS:
        return f"{matrix}.lora_A", f"{matrix}.lora_B"
    stem = f"{part}.text_model.{path}.lora_linear_layer"
    return f"{stem}.down", f"{stem}.up"
