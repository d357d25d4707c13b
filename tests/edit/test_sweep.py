"""Candidate edits side by side against the same edits applied to the weights one at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

import fasttrace as ft
from fasttrace.edit import METHODS, edited_pictures, edited_states, fit_candidates, judge, list_matrices, row_edits
from fasttrace.edit.keys import text_states
from fasttrace.errors import EditError
from fasttrace.pipeline import decode_latents

CONCEPT = {"van gogh": "painting"}
PROMPT = "a van gogh cat"


def applied(edit: Any, pipe: Any) -> Any:
    return edit.applied(pipe) if edit is not None else contextlib.nullcontext()


def test_candidates_equal_single_fits(tiny: Any) -> None:
    templates, ridges = [("{}",), ("a photo of {}", "{} on a table")], [0.01, 1.0]
    sites = ["text_encoder.*.self_attn", "text_encoder.*.fc1"]
    edits = fit_candidates(tiny, CONCEPT, sites=sites, ridges=ridges, templates=templates, preserve=["monet"])
    assert len(edits) == 2 * 6 * 2
    for index in (0, 1, 9, len(edits) - 1):
        edit = edits[index]
        alone = ft.fit_edit(
            tiny,
            CONCEPT,
            templates[index // 12],
            ridge=ridges[index % 2],
            site=edit.recipe.matrices[0],
            preserve=["monet"],
        )
        assert edit.recipe == alone.recipe
        mine, theirs = edit.updates[0], alone.updates[0]
        torch.testing.assert_close(mine.left @ mine.right.T, theirs.left @ theirs.right.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_batch", [256, 3])
def test_states_equal_applied_edits(tiny: Any, max_batch: int) -> None:
    edits: list[Any] = [
        *fit_candidates(
            tiny, CONCEPT, sites=["text_encoder.*.out_proj", "text_encoder.*.fc1", "text_encoder.*.q_proj"]
        ),
        ft.fit_edit(tiny, CONCEPT, method="memit"),
        None,
        ft.fit_edit(tiny, CONCEPT, method="uce"),
        ft.fit_edit(tiny, CONCEPT, ("{}", "a photo of {}"), mode="release"),
    ]
    states = edited_states(tiny, edits, PROMPT, max_batch)
    for edit, found in zip(edits, states, strict=True):
        with applied(edit, tiny):
            torch.testing.assert_close(found, text_states(tiny, [PROMPT])[0], rtol=1e-4, atol=2e-5)


def test_pictures_equal_applied_edits(tiny_sd15: Any) -> None:
    edits: list[Any] = [*(ft.fit_edit(tiny_sd15, CONCEPT, method=method) for method in METHODS), None]
    pictures = edited_pictures(tiny_sd15, edits, PROMPT, 3, num_inference_steps=2, max_batch=4)
    different = 0
    for edit, found in zip(edits, pictures, strict=True):
        with applied(edit, tiny_sd15):
            final = tiny_sd15(
                PROMPT, generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="latent"
            ).images
        torch.testing.assert_close(found, decode_latents(tiny_sd15, final)[0], rtol=1e-3, atol=1e-4)
        different += int(not torch.allclose(found, pictures[-1], atol=1e-3))
    assert different >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures_are_the_pipeline_s_own_where_the_scheduler_draws_noise(dtype: torch.dtype) -> None:
    """The noise of later steps follows the latents in the seed's stream; it must not start with them again."""
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=dtype)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    own = decode_latents(pipe, pipe(PROMPT, generator=generator, num_inference_steps=2, output_type="latent").images)
    rows = edited_pictures(pipe, [None, None], PROMPT, 3, num_inference_steps=2)
    judged = judge.pictures(pipe, [PROMPT, PROMPT], [3, 4], num_inference_steps=2, guidance_scale=7.5)
    torch.testing.assert_close(rows, own.expand_as(rows), rtol=0, atol=1e-5)
    torch.testing.assert_close(judged[:1], own, rtol=0, atol=1e-5)
    assert float((judged[1] - own[0]).abs().max()) > 1e-3


def test_rows_leave_no_trace(tiny_sd15: Any) -> None:
    before = {m.name: m.weight._version for m in list_matrices(tiny_sd15)}
    edits = fit_candidates(tiny_sd15, CONCEPT, sites="text_encoder.*.mlp")
    clean = text_states(tiny_sd15, [PROMPT])
    with pytest.raises(EditError, match="3 rows, but edits for 2"), row_edits(tiny_sd15, edits[:2]):
        text_states(tiny_sd15, [PROMPT] * 3)
    assert torch.equal(text_states(tiny_sd15, [PROMPT]), clean)
    assert before == {m.name: m.weight._version for m in list_matrices(tiny_sd15)}


def test_bad_input(tiny_sd15: Any, tiny_sdxl: Any) -> None:
    edit = ft.fit_edit(tiny_sdxl, CONCEPT, method="uce")
    with pytest.raises(EditError, match="another model"), row_edits(tiny_sd15, [edit]):
        pass
    with pytest.raises(EditError, match="not in a text encoder"):
        fit_candidates(tiny_sd15, CONCEPT, sites="unet.*.attn2")
    with pytest.raises(EditError, match="at least one edit"):
        edited_states(tiny_sd15, [], PROMPT)
    with pytest.raises(EditError, match="SDXL"):
        edited_pictures(tiny_sdxl, [edit], PROMPT, 0)
    with pytest.raises(EditError, match="max_batch=0"):
        edited_states(tiny_sd15, [edit], PROMPT, max_batch=0)
    with pytest.raises(EditError, match="max_batch=-1"):
        edited_pictures(tiny_sd15, [edit], PROMPT, 0, max_batch=-1)
