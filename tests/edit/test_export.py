"""An edit handed on: the files that diffusers loads give the pictures of the edit itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.edit import export_lora, export_pipeline, list_matrices

CONCEPT = {"van gogh": "painting"}


def latents(pipe: Any, scale: float | None = None) -> Tensor:
    """Two steps of a prompt that has the concept; ``scale`` of a loaded LoRA, if not 1."""
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": generator, "output_type": "latent"}
    if scale is not None:
        options["cross_attention_kwargs"] = {"scale": scale}
    result: Tensor = pipe("a van gogh cat", **options).images
    return result


@pytest.mark.parametrize(
    ("name", "method"),
    [("tiny-sd15", "quickfix"), ("tiny-sd15", "uce"), ("tiny-sdxl", "memit"), ("tiny-sdxl", "time")],
)
def test_lora_equals_the_edit(name: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pipe = ft.zoo.random_pipeline(name)
    edit = ft.fit_edit(pipe, CONCEPT, method=method)
    before = {m.name: m.weight.clone() for m in list_matrices(pipe)}
    with edit.applied(pipe):
        expected = {m.name: m.weight.clone() for m in list_matrices(pipe)}
        picture = latents(pipe)
    file = export_lora(edit, tmp_path)
    assert file.parent == tmp_path
    pipe.load_lora_weights(tmp_path)
    plain, found = latents(pipe, scale=0.0), latents(pipe)
    assert float((picture - plain).norm()) > 100 * float((picture - found).norm())
    pipe.fuse_lora(components=[part for part in ("text_encoder", "text_encoder_2", "unet") if hasattr(pipe, part)])
    fused = {m.name: m.weight for m in list_matrices(pipe)}
    assert fused.keys() == before.keys()
    for matrix, weight in expected.items():
        scale = float((weight - before[matrix]).abs().max())
        torch.testing.assert_close(fused[matrix], weight, rtol=1e-5, atol=1e-5 * scale)


def test_pipeline_folder_has_the_edited_weights(tiny: Any, tmp_path: Path) -> None:
    edit = ft.fit_edit(tiny, CONCEPT, method="uce")
    before = {m.name: m.weight.clone() for m in list_matrices(tiny)}
    loaded = ft.load_pipeline(str(export_pipeline(edit, tiny, tmp_path / "edited")), device="cpu")
    assert all(torch.equal(m.weight, before[m.name]) for m in list_matrices(tiny))
    with edit.applied(tiny):
        theirs = {m.name: m.weight for m in list_matrices(loaded)}
        assert all(torch.equal(m.weight, theirs[m.name]) for m in list_matrices(tiny))
