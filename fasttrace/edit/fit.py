"""Fitting an edit: the checked request, the choice of method, and the joint refit of several edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import EditError
from ..prompts import Prompt
from ..sites import TEXT_PARTS, Site, discover_sites
from .auto_site import strongest_text_site
from .concepts import (
    POSITIONS,
    RELEASE_TEMPLATES,
    Concepts,
    Pair,
    Positions,
    check_compatible,
    checked,
    distinct,
    pairs_of,
    preserved,
)
from .cross_attention import fit_cross_attention
from .edit import Edit, Recipe, new_edit
from .keys import key_gram
from .matrices import Matrix, select_matrices
from .quickfix import fit_quickfix
from .rece import fit_rece
from .ridge import Prior
from .spread import fit_spread
from .update import Update

MODES = ("corrected", "release")
CAPTION_WEIGHT = 0.01  # of a token of a caption to preserve, beside an edited token's 1


@dataclass(frozen=True)
class Method:
    """What a method edits and how, unless told otherwise.

    Attributes:
        part: ``"text"`` or ``"cross_attn"``: the kind of matrices that it edits.
        ridge: its ``λ``.
        positions: its choice of tokens.
        projections: for cross-attention, which of ``to_k`` and ``to_v``.
    """

    part: Literal["text", "cross_attn"]
    ridge: float
    positions: Positions


METHODS: Mapping[str, Method] = {
    "quickfix": Method("text", 0.01, "subject_last"),
    "memit": Method("text", 0.01, "subject_last"),
    "time": Method("cross_attn", 0.1, "aligned"),
    "uce": Method("cross_attn", 0.5, "subject_last"),
    "locoedit": Method("cross_attn", 0.01, "subject_last"),
    "rece": Method("cross_attn", 0.5, "subject_last"),
}


def fit_edit(
    pipe: Any,
    concepts: Concepts,
    templates: Sequence[str] | None = None,
    *,
    ridge: float | None = None,
    mode: str = "corrected",
    method: str = "quickfix",
    site: str | Site | Iterable[str | Site] | None = None,
    positions: Positions | None = None,
    preserve: Iterable[str | Prompt] = (),
    captions: Sequence[str] = (),
    gram: Tensor | Mapping[str, Tensor] | None = None,
    effects: Any = None,
) -> Edit:
    """Fit a closed-form edit: what the model reads at an old subject becomes what it reads at a new one.

    Nothing above the edited layer is computed, and the pipeline is left as it was.

    Args:
        pipe: a pipeline of diffusers.
        concepts: ``{"old subject": "new subject"}``, one or many at once; or pairs of `fasttrace.Prompt`, whose
            subjects may stand anywhere.
        templates: sentences with one ``{}``, into which plain subjects are put: ``("{}",)`` unless given, in mode
            ``"release"`` also "A photo of {}", "An image of {}" and "A picture of {}".
        ridge: ``λ`` > 0; the method's own unless given (``METHODS``).
        mode: for Diff-QuickFix, ``"corrected"``: the last subject token, values without the projection's bias; or
            ``"release"``: as the released code, all tokens from there to the end of the padding, values with the bias.
        method: ``"quickfix"``: one text projection. ``"memit"``: spread over several text layers. ``"time"``,
            ``"uce"``, ``"locoedit"``: cross-attention. ``"rece"``: UCE, then its adversarial states, in turns.
        site: what to edit: sites, projections or globs, see `fasttrace.edit.select_matrices`; ``"auto"``: the strongest
            text site of ``effects``. Unless given: layer 0's attention in every text encoder (quickfix); the MLPs of
            the lower half of the layers (memit); all cross-attention.
        positions: ``"subject_last"``, ``"subject_last_to_end"`` or ``"aligned"``, if not the method's own.
        preserve: words, or Prompts, whose subjects keep their values exactly as far as ``λ`` allows.
        captions: whole prompts whose every token holds the edit back, with ``CAPTION_WEIGHT`` of an edited token's
            weight; those that name an old subject are left out. A few hundred keep what the model makes of other
            prompts far better than words in ``preserve`` do, for an edited matrix reads every token.
        gram: ``C [d, d]``, the sum of ``k kᵀ`` over keys to preserve (`fasttrace.edit.key_gram`); for several matrices
            with different keys, one by name of the matrix.
        effects: of a text trace, for ``site="auto"``.

    Raises:
        EditError: an unknown method, mode or rule; a subject that is both edited and preserved; spans that do not
            align; a site without a weight or of the wrong part; ``λ <= 0`` with dependent keys; a result that is not
            finite.
        SiteError: a name that matches no site.
        PromptError: a subject that is empty or cut off.
    """
    rule = _method(method)
    if mode not in MODES:
        raise EditError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "release" and method != "quickfix":
        raise EditError(f'mode="release" reproduces the released code of quickfix; method={method!r} has no such mode')
    if templates is None:
        templates = RELEASE_TEMPLATES if mode == "release" else ("{}",)
    if isinstance(templates, str):
        raise EditError(f"templates={templates!r}: expected a list of sentences")
    if positions is None:
        positions = "subject_last_to_end" if mode == "release" else rule.positions
    if positions not in POSITIONS:
        raise EditError(f"positions={positions!r}: expected one of {', '.join(POSITIONS)}")
    pairs, kept = pairs_of(concepts, templates), preserved(preserve, templates)
    matrices = _matrices(pipe, method, site, effects)
    recipe = Recipe(
        method=method,
        mode=mode,
        positions=positions,
        ridge=rule.ridge if ridge is None else float(ridge),
        matrices=tuple(matrix.name for matrix in matrices),
        pairs=tuple(pairs),
        preserve=tuple(kept),
        captions=_free_of_subjects(captions, pairs),
        has_gram=gram is not None,
    )
    return fit_recipe(pipe, recipe, gram)


def combine(pipe: Any, edits: Sequence[Edit], gram: Tensor | Mapping[str, Tensor] | None = None) -> Edit:
    """One edit that does what several do, refitted jointly: their separate updates would disturb each other.

    Args:
        pipe: the pipeline that they were fitted on.
        edits: edits of the same matrices by the same method, mode, positions and ridge.
        gram: as for `fit_edit`; needed again where the edits were fitted with one.

    Raises:
        EditError: edits that differ in more than their concepts, contradict each other, or are for another model.
    """
    if not edits:
        raise EditError("combine: expected at least one edit")
    first = edits[0].recipe
    for edit in edits:
        edit.check(pipe)
        for field in ("method", "mode", "positions", "ridge", "matrices", "has_gram"):
            mine, other = getattr(first, field), getattr(edit.recipe, field)
            if mine != other:
                raise EditError(
                    f"these edits differ in {field} ({mine!r} and {other!r}): fit them alike to combine them"
                )
    if first.has_gram and gram is None:
        raise EditError("these edits were fitted with a gram matrix, which is not stored: give it again as gram=")
    pairs = checked([pair for edit in edits for pair in edit.recipe.pairs])
    merged = {
        "pairs": tuple(pairs),
        "preserve": tuple(distinct(prompt for edit in edits for prompt in edit.recipe.preserve)),
        "captions": _free_of_subjects([caption for edit in edits for caption in edit.recipe.captions], pairs),
    }
    return fit_recipe(pipe, Recipe(**{**vars(first), **merged}), gram)


def fit_recipe(pipe: Any, recipe: Recipe, gram: Tensor | Mapping[str, Tensor] | None = None) -> Edit:
    """The edit of a recipe whose matrices and sentences are settled.

    Raises:
        EditError: a subject that is both edited and preserved.
    """
    check_compatible(recipe.pairs, recipe.preserve)
    matrices = select_matrices(pipe, recipe.matrices)
    updates = _fit(pipe, matrices, recipe, gram)
    return new_edit(matrices, updates, recipe)


def _fit(pipe: Any, matrices: list[Matrix], recipe: Recipe, gram: Any) -> list[Update]:
    pairs, preserve, positions = recipe.pairs, recipe.preserve, recipe.positions
    if METHODS[recipe.method].part == "cross_attn":
        if isinstance(gram, Mapping):
            raise EditError("cross-attention's matrices share their keys: expected one gram matrix, not a mapping")
        fit = fit_rece if recipe.method == "rece" else fit_cross_attention
        total = _with_captions(pipe, matrices[0], recipe.captions, gram)
        return fit(pipe, pairs, preserve, matrices, Prior(recipe.ridge, total), positions)
    grams = _grams(matrices, gram)
    priors = {
        matrix.name: Prior(recipe.ridge, _with_captions(pipe, matrix, recipe.captions, grams.get(matrix.name)))
        for matrix in matrices
    }
    if recipe.method == "memit":
        return fit_spread(pipe, pairs, preserve, matrices, priors, positions)
    return fit_quickfix(pipe, pairs, preserve, matrices, priors, positions, with_bias=recipe.mode == "release")


def _free_of_subjects(captions: Sequence[str], pairs: Sequence[Pair]) -> tuple[str, ...]:
    """The captions, each once, that name nothing that is edited: holding those would undo the edit."""
    if isinstance(captions, str):
        raise EditError(f"captions={captions!r}: expected a list of prompts")
    subjects = {pair.old.subject.lower() for pair in pairs if pair.old.subject}
    return tuple(text for text in dict.fromkeys(captions) if not any(word in text.lower() for word in subjects))


def _with_captions(pipe: Any, matrix: Matrix, captions: Sequence[str], gram: Tensor | None) -> Tensor | None:
    """``C``: what was given, and the captions' keys."""
    if not captions:
        return gram
    keys = CAPTION_WEIGHT * key_gram(pipe, captions, matrix.name)
    return keys if gram is None else keys + gram.to(keys)


def _grams(matrices: Sequence[Matrix], gram: Any) -> Mapping[str, Tensor]:
    """``C`` by name of the matrix, where one was given."""
    if isinstance(gram, Mapping):
        unknown = sorted(set(gram) - {matrix.name for matrix in matrices})
        if unknown:
            raise EditError(f"gram has the name {unknown[0]!r}, which is not among the edited matrices")
        return gram
    if gram is not None and len(matrices) > 1:
        raise EditError(f"{len(matrices)} text matrices have different keys: give gram as {{name of the matrix: C}}")
    return {} if gram is None else {matrices[0].name: gram}


def _method(name: str) -> Method:
    if name not in METHODS:
        raise EditError(f"method={name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def _matrices(pipe: Any, method: str, site: Any, effects: Any) -> list[Matrix]:
    part = METHODS[method].part
    if isinstance(site, str) and site == "auto":
        if part != "text":
            raise EditError(f'site="auto" chooses a text site, and method={method!r} edits cross-attention')
        site = strongest_text_site(effects)
    matrices = select_matrices(pipe, _default_sites(pipe, method) if site is None else site)
    wrong = [matrix for matrix in matrices if matrix.is_text != (part == "text")]
    if wrong:
        others = ", ".join(name for name, other in METHODS.items() if other.part != part)
        place = "text encoders" if part == "text" else "cross-attention"
        raise EditError(f"method={method!r} edits {place}, and {wrong[0].name} is not there: use one of {others}")
    return matrices


def _default_sites(pipe: Any, method: str) -> list[str]:
    sites = discover_sites(pipe)
    if METHODS[method].part == "cross_attn":
        return _some([s.name for s in sites if s.kind == "cross_attn"], pipe, "cross-attention")
    text = [site for site in sites if site.part in TEXT_PARTS]
    if method == "quickfix":
        return _some([s.name for s in text if s.kind == "self_attn" and s.layer == 0], pipe, "text layers")
    depth = {part: 1 + max(s.layer for s in text if s.part == part) for part in {s.part for s in text}}
    names = [s.name for s in text if s.kind == "mlp" and s.layer <= (depth[s.part] - 1) // 2]
    return _some(names, pipe, "text layers")


def _some(names: list[str], pipe: Any, what: str) -> list[str]:
    if not names:
        raise EditError(f"{type(pipe).__name__} has no {what} to edit")
    return names
