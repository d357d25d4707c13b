"""The edit object: low-rank updates of named matrices, with the recipe that they were fitted by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EditError
from ..prompts import Prompt
from .concepts import Pair, Positions
from .matrices import Matrix, fingerprint
from .update import Applied, Update, matrices_of, unedited

FORMAT = "fasttrace edit 1"
_LARGEST = 1e6  # of a factor: far above any fit, far below what overflows
_FACTORS, RECIPE_FILE = "factors.safetensors", "edit.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that an edit was fitted by, so that it can be refitted together with others.

    Attributes:
        method: ``"quickfix"``, ``"time"``, ``"uce"``, ``"locoedit"``, ``"rece"`` or ``"memit"``.
        mode: ``"corrected"`` or ``"release"``.
        positions: which tokens gave keys and values.
        ridge: ``λ``.
        matrices: names of the edited matrices.
        pairs: old and new sentences.
        preserve: sentences whose subjects were to keep their values.
        captions: whole prompts of which every token was to keep its value.
        has_gram: whether a Gram matrix of keys to preserve was given; it is not stored.
    """

    method: str
    mode: str
    positions: Positions
    ridge: float
    matrices: tuple[str, ...]
    pairs: tuple[Pair, ...]
    preserve: tuple[Prompt, ...] = ()
    captions: tuple[str, ...] = ()
    has_gram: bool = False


@dataclass(frozen=True, eq=False)
class Edit:
    """A closed-form change of one weight matrix, or of many; made by `fasttrace.fit_edit` or `fasttrace.load_edit`.

    Attributes:
        updates: one for each matrix.
        recipe: what it was fitted by.
        fingerprints: digest of each matrix that it was fitted on, by name.
    """

    updates: tuple[Update, ...]
    recipe: Recipe
    fingerprints: Mapping[str, str] = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank among the updates."""
        return max(update.rank for update in self.updates)

    @property
    def parameters(self) -> int:
        """How many weights the edit changes."""
        return sum(update.left.shape[0] * update.right.shape[0] for update in self.updates)

    def check(self, pipe: Any) -> list[Matrix]:
        """The pipeline's matrices that this edit changes.

        Raises:
            EditError: the pipeline's model is not the one that the edit was fitted on.
        """
        matrices = matrices_of(pipe, self.updates)
        for matrix in matrices:
            known = self.fingerprints[matrix.name]
            if known not in (fingerprint(matrix.weight), fingerprint(unedited(matrix.weight))):
                raise EditError(
                    f"this edit is for another model: {matrix.name} has other weights than the matrix that it was "
                    "fitted on (an edit made permanent counts too); fit it again on this pipeline"
                )
        return matrices

    def apply(self, pipe: Any) -> Applied:
        """Change the pipeline's weights in place; ``.revert()`` of what is returned undoes it, bit by bit.

        Edits of one matrix that are applied at the same time add up; `fasttrace.edit.combine` fits them together.

        Raises:
            EditError: an edit for another model. The weights are untouched then.
        """
        return Applied(self.check(pipe), self.updates)

    @contextlib.contextmanager
    def applied(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with the edit in its weights; then, also after an exception, they are bit by bit as before.

        Raises:
            EditError: an edit for another model. The weights are untouched then.
        """
        applied = self.apply(pipe)
        try:
            yield pipe
        finally:
            applied.revert()

    def save(self, folder: str | Path) -> Path:
        """Write the factors (``factors.safetensors``) and everything else (``edit.json``); returns the folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        rights: dict[int, str] = {}
        entries = {}
        for index, update in enumerate(self.updates):
            right = rights.setdefault(id(update.right), f"right.{len(rights)}")
            left = f"left.{index}"
            tensors[left], tensors[right] = update.left, update.right
            digest = self.fingerprints[update.name]
            entries[update.name] = {"left": left, "right": right, "fingerprint": digest}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / _FACTORS)
        table = {"format": FORMAT, "recipe": _recipe_to_json(self.recipe), "matrices": entries}
        (folder / RECIPE_FILE).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder


def load_edit(folder: str | Path) -> Edit:
    """The edit that `Edit.save` wrote; the model is checked when it is applied.

    Raises:
        EditError: no edit in that folder, or one that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file() or not (folder / _FACTORS).is_file():
        raise EditError(f"no edit in {str(folder)!r}: expected {RECIPE_FILE} and {_FACTORS}, as Edit.save writes them")
    try:
        table = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise EditError(f"{folder / RECIPE_FILE} has format {table['format']!r}: expected {FORMAT!r}")
        tensors = load_file(folder / _FACTORS)
        entries = table["matrices"]
        updates = tuple(Update(name, tensors[e["left"]], tensors[e["right"]]) for name, e in entries.items())
        _check_loaded(folder, updates, table["recipe"]["matrices"])
        digests = {name: str(entry["fingerprint"]) for name, entry in entries.items()}
        return Edit(updates, _recipe_from_json(table["recipe"]), digests)
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        SafetensorError,
    ) as error:
        raise EditError(f"the edit in {str(folder)!r} cannot be read ({type(error).__name__}: {error})") from error


def _check_loaded(folder: Path, updates: Sequence[Update], named: Any) -> None:
    """Refuse factors that no fit gives, and an edit that lost some of its matrices."""
    names = [update.name for update in updates]
    if not names or sorted(names) != sorted(named):
        raise EditError(f"the edit in {str(folder)!r} has {len(names)} of its {len(named)} matrices: save it again")
    for update in updates:
        for factor in (update.left, update.right):
            if not factor.is_floating_point() or factor.dim() != 2 or not bool(factor.abs().max() < _LARGEST):
                raise EditError(
                    f"the edit in {str(folder)!r} has factors of {update.name} that are not finite, above "
                    f"{_LARGEST:g}, or no matrices of numbers: save it again"
                )
        if update.left.shape[1] != update.right.shape[1]:
            raise EditError(
                f"the edit in {str(folder)!r} has factors of {update.name} of different rank: save it again"
            )


def _recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    pairs = [{"old": _prompt_to_json(pair.old), "new": _prompt_to_json(pair.new)} for pair in recipe.pairs]
    preserve = [_prompt_to_json(prompt) for prompt in recipe.preserve]
    return asdict(recipe) | {"pairs": pairs, "preserve": preserve}


def _recipe_from_json(table: dict[str, Any]) -> Recipe:
    pairs = tuple(Pair(_prompt_from_json(pair["old"]), _prompt_from_json(pair["new"])) for pair in table["pairs"])
    preserve = tuple(_prompt_from_json(prompt) for prompt in table["preserve"])
    lists = {name: tuple(table[name]) for name in ("matrices", "captions")}
    return Recipe(**table | lists | {"pairs": pairs, "preserve": preserve})


def _prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.text, "subject": prompt.subject, "span": prompt.span}


def _prompt_from_json(table: dict[str, Any]) -> Prompt:
    span = None if table["span"] is None else (int(table["span"][0]), int(table["span"][1]))
    return Prompt(table["text"], table["subject"], span=span)


def new_edit(matrices: list[Matrix], updates: list[Update], recipe: Recipe) -> Edit:
    """An edit from its fitted parts, with right factors in the precision in which they will be applied.

    Raises:
        EditError: a factor that is not finite.
    """
    narrowed: dict[int, Tensor] = {}
    final = []
    for matrix, update in zip(matrices, updates, strict=True):
        wide = torch.promote_types(matrix.weight.dtype, torch.float32)
        right = narrowed.setdefault(id(update.right), update.right.to(wide))
        if not torch.isfinite(update.left).all() or not torch.isfinite(right).all():
            raise EditError(
                f"the edit of {update.name} is not finite: check the model's weights, or use a larger ridge"
            )
        final.append(Update(update.name, update.left, right))
    return Edit(tuple(final), recipe, {matrix.name: fingerprint(matrix.weight) for matrix in matrices})
