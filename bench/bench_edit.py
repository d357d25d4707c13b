"""Closed-form edits on SD1.x's true shapes: speed beside the published way, and error against float64.

    python -m bench.bench_edit [error] [quickfix] [cross_attention] [sweep]

The published way of TIME, UCE and LocoEdit, written here from their formula, builds ``λ W₀ + V Kᵀ`` and ``λ I + K Kᵀ``
for each matrix in float32 and inverts the second. Both sides get the same text states. Ours are checked against the
same formula solved in float64 before they are timed; how far the rival's float32 inverse is from it stands in the row.
Interleaved, medians of some rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.edit import METHODS, Edit, edited_states, fit_candidates, list_matrices
from fasttrace.edit.concepts import pairs_of, preserved
from fasttrace.edit.cross_attention import multiplied, state_keys
from fasttrace.edit.keys import text_states
from fasttrace.edit.matrices import Matrix
from fasttrace.edit.ridge import Prior, reference, ridge_right
from fasttrace.edit.update import add_updates

from . import record
from .timing import beside, interleaved

CONCEPTS = {"van gogh": "painting", "cat": "dog", "eiffel tower": "bridge", "monet": "picasso"}
PRESERVED = ["rembrandt", "horse", "big ben", "table", "landscape"]
Row = dict[str, Any]


def published(weight: Tensor, keys: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """One matrix the published way, float32."""
    values = weight @ targets
    eye = torch.eye(weight.shape[1])
    return (ridge * weight + values @ keys.T) @ torch.inverse(ridge * eye + keys @ keys.T)


@torch.no_grad()
def cross_attention(pipe: Any, rounds: int) -> list[Row]:
    """Solve for all 32 matrices and write them, from given text states, with each method's own tokens and ridge."""
    matrices = [m for m in list_matrices(pipe) if not m.is_text]
    rows = []
    for method, count, words in (("locoedit", 1, []), ("locoedit", 4, []), ("uce", 4, PRESERVED), ("time", 1, [])):
        rule = METHODS[method]
        pairs = pairs_of(dict(list(CONCEPTS.items())[:count]), ("{}",))
        old, new, kept = state_keys(pipe, pairs, preserved(words, ("{}",)), rule.positions)
        keys, targets = torch.cat([old, kept], dim=1), torch.cat([new, kept], dim=1)

        def one_by_one(keys: Tensor = keys, targets: Tensor = targets, ridge: float = rule.ridge) -> None:
            for matrix in matrices:
                matrix.weight.copy_(published(matrix.weight, keys, targets, ridge))

        def shared(old: Tensor = old, new: Tensor = new, kept: Tensor = kept, ridge: float = rule.ridge) -> None:
            updates = multiplied(matrices, new - old, ridge_right(old, Prior(ridge), kept).float())
            add_updates([matrix.weight for matrix in matrices], updates)

        truth = [reference(m.weight, keys, m.weight.double() @ targets.double(), rule.ridge) for m in matrices]
        errors = [_largest_error(matrices, truth, write) for write in (shared, one_by_one)]
        assert errors[0] < 1e-6, f"{method}: an error of {errors[0]:.1e}"
        timing = interleaved({"published": one_by_one, "fasttrace": shared}, rounds)
        said = {
            "what": f"{method}: solve and apply, {len(matrices)} matrices, {keys.shape[1]} keys",
            "rival": "one d x d system for each matrix, float32 inverse",
            "error": f"{errors[0]:.1e}",
            "rival_error": f"{errors[1]:.1e}",
        }
        rows.append(beside(said, timing["fasttrace"], timing["published"]))
    return rows


def _largest_error(matrices: list[Matrix], truth: list[Tensor], write: Callable[[], None]) -> float:
    """Of the weights that a writer makes, which are put back: relative, in Frobenius norm."""
    before = [matrix.weight.clone() for matrix in matrices]
    write()
    largest = max(_error(matrix.weight, exact) for matrix, exact in zip(matrices, truth, strict=True))
    for matrix, weight in zip(matrices, before, strict=True):
        matrix.weight.copy_(weight)
    return largest


def _error(weight: Tensor, truth: Tensor) -> float:
    return float((weight.double() - truth).norm() / truth.norm())


def quickfix(pipe: Any, rounds: int) -> list[Row]:
    """One Diff-QuickFix concept from words to weights and back, text forward included."""
    encoder, tokenizer, ridge = pipe.text_encoder, pipe.tokenizer, METHODS["quickfix"].ridge
    matrix = next(m for m in list_matrices(pipe) if m.name.endswith("layers.0.self_attn.out_proj"))

    @torch.no_grad()
    def keys_and_targets() -> list[Tensor]:
        columns = []
        for text, position in (("van gogh", 2), ("painting", 1)):
            seen: list[Tensor] = []
            handle = matrix.module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0][0]))
            encoder(tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids)
            handle.remove()
            columns.append(seen[0][position][:, None])
        return columns

    @torch.no_grad()
    def rival() -> None:
        before = matrix.weight.clone()
        matrix.weight.copy_(published(matrix.weight, *keys_and_targets(), ridge))
        matrix.weight.copy_(before)

    def ours() -> None:
        with ft.fit_edit(pipe, {"van gogh": "painting"}).applied(pipe):
            pass

    keys, targets = keys_and_targets()
    truth = reference(matrix.weight, keys, matrix.weight.double() @ targets.double(), ridge)
    with ft.fit_edit(pipe, {"van gogh": "painting"}).applied(pipe):
        ours_error = _error(matrix.weight, truth)
    assert ours_error < 1e-6, f"an error of {ours_error:.1e}"
    timing = interleaved({"published": rival, "fasttrace": ours}, rounds)
    said = {
        "what": "Diff-QuickFix: text forward, fit, apply, revert",
        "rival": "whole text forwards, d x d system, float32 inverse",
        "error": f"{ours_error:.1e}",
        "rival_error": f"{_error(published(matrix.weight, keys, targets, ridge), truth):.1e}",
    }
    return [beside(said, timing["fasttrace"], timing["published"])]


def sweep(pipe: Any, rounds: int) -> list[Row]:
    """Text states of a prompt under many candidates, beside applying and reverting one after the other."""
    sites, ridges = ["text_encoder.*.self_attn", "text_encoder.*.mlp"], [1e-3, 0.01, 0.1, 1.0]
    prompt = "a cat and a van gogh on a table"

    def together() -> list[Edit]:
        return fit_candidates(pipe, {"van gogh": "painting"}, sites=sites, ridges=ridges)

    def singly() -> list[Edit]:
        return [
            ft.fit_edit(pipe, {"van gogh": "painting"}, site=f"text_encoder.encoder.layers.{layer}.{kind}", ridge=r)
            for kind in ("self_attn", "mlp")
            for layer in range(12)
            for r in ridges
        ]

    edits = together()

    def one_by_one() -> Tensor:
        states = []
        for edit in edits:
            with edit.applied(pipe):
                states.append(text_states(pipe, [prompt])[0])
        return torch.stack(states)

    alone = {(edit.recipe.matrices, edit.recipe.ridge): edit for edit in singly()}
    for edit in edits:
        (ours,), (theirs,) = edit.updates, alone[edit.recipe.matrices, edit.recipe.ridge].updates
        torch.testing.assert_close(ours.left @ ours.right.T, theirs.left @ theirs.right.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edited_states(pipe, edits, prompt), one_by_one(), rtol=1e-4, atol=1e-4)
    fitted = interleaved({"shared": together, "single": singly}, rounds)
    states = interleaved({"rows": lambda: edited_states(pipe, edits, prompt), "applied": one_by_one}, rounds)
    fit = {"what": f"{len(edits)} candidates (24 sites x {len(ridges)} ridges): fit", "rival": "fit_edit for each"}
    read = {
        "what": f"{len(edits)} candidates: text states of one prompt",
        "rival": "apply, encode, revert for each",
    }
    return [beside(fit, fitted["shared"], fitted["single"]), beside(read, states["rows"], states["applied"])]


def error(outputs: int = 768) -> list[Row]:
    """Relative error of the edited weight to float64, in Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for width in (768, 3072):
        for ridge in (0.1, 1e-3):
            weight = torch.randn(outputs, width, generator=generator) / width**0.5
            keys, targets = (torch.randn(width, 4, generator=generator) for _ in range(2))
            truth = reference(weight, keys, weight.double() @ targets.double(), ridge)
            ours = weight + (weight @ (targets - keys)) @ ridge_right(keys, Prior(ridge)).float().T
            errors = [_error(w, truth) for w in (ours, published(weight, keys, targets, ridge))]
            rows.append(
                {
                    "what": f"relative error to float64, d = {width}, ridge {ridge:g}, 4 keys",
                    "rival": "d x d float32 inverse",
                    "error": f"{errors[0]:.1e}",
                    "rival_error": f"{errors[1]:.1e}",
                }
            )
    return rows


def main() -> None:
    parts: dict[str, Callable[[Any], list[Row]]] = {
        "error": lambda pipe: error(),
        "quickfix": lambda pipe: quickfix(pipe, 7),
        "cross_attention": lambda pipe: cross_attention(pipe, 5),
        "sweep": lambda pipe: sweep(pipe, 3),
    }
    pipe = ft.zoo.random_pipeline("sd15")
    for name in sys.argv[1:] or parts:
        rows = parts[name](pipe)
        for row in rows:
            print(row, flush=True)
        record.append("edit", rows)


if __name__ == "__main__":
    main()
