"""Thousands of candidate edits: fitted from shared forwards, evaluated side by side, and never put into the weights.

Row ``i`` of a batch carries its own low-rank factors through the forward: ``x Wᵀ + (x Bᵢ) Aᵢᵀ`` at every matrix that
its edit changes. Where only one text matrix is edited, the rows are one row up to there: they join at the edited layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EditError
from ..pipeline import decode_latents, needs_added
from ..prompts import Prompt
from ..sites import TEXT_PARTS, Site
from .concepts import Concepts, Positions, check_compatible, pairs_of, preserved
from .edit import Edit, Recipe, new_edit
from .keys import text_columns, text_states, tokens_of
from .matrices import select_matrices
from .quickfix import moved_values
from .ridge import ridge_path
from .update import Update, matrices_of


def fit_candidates(
    pipe: Any,
    concepts: Concepts,
    *,
    sites: str | Site | Iterable[str | Site],
    ridges: Sequence[float] = (0.01,),
    templates: Sequence[Sequence[str]] = (("{}",),),
    positions: Positions = "subject_last",
    preserve: Iterable[str | Prompt] = (),
) -> list[Edit]:
    """Diff-QuickFix (mode ``"corrected"``) at each site, with each ridge and each set of templates.

    A set of templates costs two forwards, whatever the number of sites, and a (site, templates) one eigendecomposition,
    whatever the number of ridges.

    Returns:
        ``len(templates) * number of matrices * len(ridges)`` edits, ridges varying fastest, then matrices.

    Raises:
        EditError: as `fasttrace.fit_edit`.
    """
    matrices = select_matrices(pipe, sites)
    outside = [matrix.name for matrix in matrices if not matrix.is_text]
    if outside:
        raise EditError(f"{outside[0]} is not in a text encoder: candidates are fitted at text sites")
    preserve, edits = list(preserve), []
    for sentences in templates:
        pairs, kept_prompts = pairs_of(concepts, sentences), preserved(preserve, sentences)
        check_compatible(pairs, kept_prompts)
        for part, group in groupby(matrices, key=lambda matrix: matrix.part):
            members = list(group)
            modules = {matrix.name: matrix.module for matrix in members}
            request = tokens_of(pipe, part, pairs, kept_prompts, positions)
            old, new, kept = (
                text_columns(getattr(pipe, part), tokens, modules)
                for tokens in (request.old, request.new, request.keep)
            )
            for matrix in members:
                name = matrix.name
                left = moved_values(matrix, new[name] - old[name])
                for ridge, right in zip(ridges, ridge_path(old[name], list(ridges), kept[name]), strict=True):
                    recipe = Recipe(
                        "quickfix", "corrected", positions, ridge, (name,), tuple(pairs), tuple(kept_prompts)
                    )
                    edits.append(new_edit([matrix], [Update(name, left, right)], recipe))
    return edits


@contextlib.contextmanager
def row_edits(pipe: Any, edits: Sequence[Edit | None]) -> Iterator[None]:
    """Row ``i`` of every batch runs with ``edits[i]``; the weights stay as they are.

    A batch of one fans out to ``len(edits)`` rows at the first edited matrix. A batch of ``m * len(edits)`` rows, as
    classifier-free guidance makes, is ``m`` copies in the same order.

    Args:
        pipe: the pipeline.
        edits: one for each row; ``None`` leaves a row unedited.

    Raises:
        EditError: an edit for another model; a batch of another size.
    """
    for candidate in {id(edit): edit for edit in edits if edit is not None}.values():
        matrices_of(pipe, candidate.updates)
    rows: dict[str, dict[int, Update]] = {}
    for row, edit in enumerate(edits):
        for update in edit.updates if edit is not None else ():
            rows.setdefault(update.name, {})[row] = update
    handles = []
    try:
        for matrix in select_matrices(pipe, list(rows)) if rows else ():
            hook = _row_hook(rows[matrix.name], len(edits), matrix.name, matrix.weight)
            handles.append(matrix.module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_hook(updates: dict[int, Update], count: int, name: str, weight: Tensor) -> Callable[..., Tensor]:
    """Adds ``(x Bᵢ) Aᵢᵀ`` to the output of each row; ranks are padded with zeros to the largest."""
    rank = max(update.rank for update in updates.values())
    left = weight.new_zeros(count, weight.shape[0], rank)
    right = weight.new_zeros(count, weight.shape[1], rank)
    for row, update in updates.items():
        left[row, :, : update.rank] = update.left.to(left)
        right[row, :, : update.rank] = update.right.to(right)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.shape[0] == 1:
            return output + (x @ right) @ left.mT
        copies, rest = divmod(x.shape[0], count)
        if rest:
            raise EditError(f"{name}: a batch of {x.shape[0]} rows, but edits for {count}")
        grouped = x.reshape(copies, count, *x.shape[1:])
        return output + ((grouped @ right) @ left.mT).reshape(output.shape)

    return hook


@torch.no_grad()
def edited_states(pipe: Any, edits: Sequence[Edit | None], prompt: str, max_batch: int = 256) -> Tensor:
    """``[E, T, D]``: the text states of one prompt under each edit, as the UNet would read them.

    Args:
        pipe: the pipeline.
        edits: candidates; those that change no text matrix give the prompt's own states.
        max_batch: rows at once.

    Raises:
        EditError: no edits, an edit for another model, or ``max_batch`` below 1.
    """
    _checked_batch(max_batch)
    if not edits:
        raise EditError("expected at least one edit; None stands for the unedited model")
    order = sorted(range(len(edits)), key=lambda i: _text_names(edits[i]))
    single = getattr(pipe, "text_encoder_2", None) is None
    parts: list[Tensor] = []
    indices: list[int] = []
    for names, group in groupby(order, key=lambda i: _text_names(edits[i])):
        members = list(group)
        indices += members
        if not names:
            parts.append(text_states(pipe, [prompt]).expand(len(members), -1, -1))
            continue
        fans_out = single and len(names) == 1 and _fans_out(pipe, edits[members[0]], names[0])
        for start in range(0, len(members), max_batch):
            chunk = members[start : start + max_batch]
            with row_edits(pipe, [edits[i] for i in chunk]):
                parts.append(text_states(pipe, [prompt] * (1 if fans_out else len(chunk))))
    states = torch.cat(parts)
    return states[torch.argsort(torch.tensor(indices)).to(states.device)]


def _fans_out(pipe: Any, edit: Edit | None, name: str) -> bool:
    """Whether what follows an edited matrix broadcasts a batch of one over the rows, as all but attention does."""
    assert edit is not None
    (matrix,) = matrices_of(pipe, [update for update in edit.updates if update.name == name])
    return not matrix.before_attention


def _checked_batch(max_batch: int) -> None:
    if max_batch < 1:
        raise EditError(f"max_batch={max_batch}: expected at least 1 row at once")


def _text_names(edit: Edit | None) -> tuple[str, ...]:
    updates = edit.updates if edit is not None else ()
    return tuple(update.name for update in updates if update.name.split(".")[0] in TEXT_PARTS)


@torch.no_grad()
def edited_pictures(
    pipe: Any,
    edits: Sequence[Edit | None],
    prompt: str,
    seed: int,
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    max_batch: int = 16,
) -> Tensor:
    """``[E, 3, H, W]`` in [0, 1]: one prompt and seed under each edit, from the same latents and scheduler noise.

    Both branches of guidance run under the row's edit, as they would with the edit in the weights.

    Raises:
        EditError: no edits, ``max_batch`` below 1, or a pipeline with added conditions (SDXL), whose pooled text is not
            followed row by row.
    """
    _checked_batch(max_batch)
    if needs_added(pipe):
        raise EditError("edited_pictures: SDXL's pooled text is not followed row by row; apply the edits one at a time")
    conditional = edited_states(pipe, edits, prompt)
    negative = edited_states(pipe, edits, "")
    final = []
    for first in range(0, len(edits), max_batch):
        chunk = slice(first, first + max_batch)
        count = len(edits[chunk])
        with row_edits(pipe, edits[chunk]):
            result = pipe(
                prompt_embeds=conditional[chunk],
                negative_prompt_embeds=negative[chunk],
                generator=[torch.Generator().manual_seed(seed) for _ in range(count)],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            )
        final.append(result.images)
    return decode_latents(pipe, torch.cat(final))
