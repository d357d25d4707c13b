"""Closed-form edits on SD1.x's true shapes: speed beside the published way, and error against float64.

    python -m bench.bench_edit [error] [quickfix] [cross_attention] [sweep]

The published way, written here from its formula, builds ``λ W₀ + V Kᵀ`` and ``λ I + K Kᵀ`` for each matrix in float32
and inverts the second. Both sides get the same text states; interleaved, medians of some rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.edit import edited_states, fit_candidates, list_matrices
from fasttrace.edit.concepts import pairs_of
from fasttrace.edit.cross_attention import multiplied, state_keys
from fasttrace.edit.keys import text_states
from fasttrace.edit.matrices import Matrix
from fasttrace.edit.ridge import Prior, reference, ridge_right
from fasttrace.edit.update import add_updates

from . import record
from .timing import beside, interleaved

RIDGE = 0.1
CONCEPTS = {"van gogh": "painting", "cat": "dog", "eiffel tower": "bridge", "monet": "picasso"}
Row = dict[str, Any]


def published(weight: Tensor, keys: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """One matrix the published way, float32."""
    values = weight @ targets
    eye = torch.eye(weight.shape[1])
    return (ridge * weight + values @ keys.T) @ torch.inverse(ridge * eye + keys @ keys.T)


@torch.no_grad()
def cross_attention(pipe: Any, rounds: int) -> list[Row]:
    """Solve for all 32 matrices and write them, from given text states."""
    matrices = [m for m in list_matrices(pipe) if not m.is_text]
    rows = []
    for count in (1, 4):
        pairs = pairs_of(dict(list(CONCEPTS.items())[:count]), ("{}",))
        old, new, _ = state_keys(pipe, pairs, (), "subject_last")
        _check_same_answer(matrices[-1], old, new)

        def one_by_one(old: Tensor = old, new: Tensor = new) -> None:
            for matrix in matrices:
                matrix.weight.copy_(published(matrix.weight, old, new, RIDGE))

        def shared(old: Tensor = old, new: Tensor = new) -> None:
            updates = multiplied(matrices, new - old, ridge_right(old, Prior(RIDGE)).float())
            add_updates([matrix.weight for matrix in matrices], updates)

        timing = interleaved({"published": one_by_one, "fasttrace": shared}, rounds)
        said = {
            "what": f"cross-attention: solve and apply, {len(matrices)} matrices, rank {count}",
            "rival": "one d x d system for each matrix, float32 inverse",
        }
        rows.append(beside(said, timing["fasttrace"], timing["published"]))
    return rows


def _check_same_answer(matrix: Matrix, old: Tensor, new: Tensor) -> None:
    weight = matrix.weight.clone()
    update = multiplied([matrix], new - old, ridge_right(old, Prior(RIDGE)).float())[0]
    difference = weight + update.left @ update.right.T - published(weight, old, new, RIDGE)
    assert float(difference.norm() / weight.norm()) < 1e-3, "the rivals disagree"


def quickfix(pipe: Any, rounds: int) -> list[Row]:
    """One Diff-QuickFix concept from words to weights and back, text forward included."""
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    matrix = next(m for m in list_matrices(pipe) if m.name.endswith("layers.0.self_attn.out_proj"))

    @torch.no_grad()
    def whole_forward() -> None:
        columns = []
        for text, position in (("van gogh", 2), ("painting", 1)):
            seen: list[Tensor] = []
            handle = matrix.module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0][0]))
            encoder(tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids)
            handle.remove()
            columns.append(seen[0][position][:, None])
        before = matrix.weight.clone()
        matrix.weight.copy_(published(matrix.weight, columns[0], columns[1], 0.01))
        matrix.weight.copy_(before)

    def ours(mode: str = "corrected") -> None:
        with ft.fit_edit(pipe, {"van gogh": "painting"}, mode=mode).applied(pipe):
            pass

    timing = interleaved({"published": whole_forward, "corrected": ours, "release": lambda: ours("release")}, rounds)
    rival = "whole text forwards, d x d system, float32 inverse (one key)"
    return [
        beside(
            {"what": f"Diff-QuickFix: text forward, fit, apply, revert, mode {mode}", "rival": rival},
            timing[mode],
            timing["published"],
        )
        for mode in ("corrected", "release")
    ]


def sweep(pipe: Any, rounds: int) -> list[Row]:
    """Text states of a prompt under many candidates, beside applying and reverting one after the other."""
    sites, ridges = ["text_encoder.*.self_attn", "text_encoder.*.mlp"], [1e-3, 0.01, 0.1, 1.0]
    prompt = "a cat and a van gogh on a table"
    fitted = interleaved(
        {
            "shared": lambda: fit_candidates(pipe, {"van gogh": "painting"}, sites=sites, ridges=ridges),
            "single": lambda: [
                ft.fit_edit(pipe, {"van gogh": "painting"}, site=f"text_encoder.encoder.layers.{layer}.{kind}", ridge=r)
                for layer in range(12)
                for kind in ("self_attn", "mlp")
                for r in ridges
            ],
        },
        rounds,
    )
    edits = fit_candidates(pipe, {"van gogh": "painting"}, sites=sites, ridges=ridges)

    def one_by_one() -> None:
        for edit in edits:
            with edit.applied(pipe):
                text_states(pipe, [prompt])

    states = interleaved(
        {"rows": lambda: edited_states(pipe, edits, prompt), "applied": one_by_one}, max(1, rounds // 2)
    )
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
            errors = [
                float((w.double() - truth).norm() / truth.norm())
                for w in (ours, published(weight, keys, targets, ridge))
            ]
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
        "sweep": lambda pipe: sweep(pipe, 2),
    }
    pipe = ft.zoo.random_pipeline("sd15")
    for name in sys.argv[1:] or parts:
        rows = parts[name](pipe)
        for row in rows:
            print(row, flush=True)
        record.append("edit", rows)


if __name__ == "__main__":
    main()
