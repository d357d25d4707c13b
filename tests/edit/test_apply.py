"""Applying, reverting, nesting, saving and loading edits; and every bad input leaves the weights untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.edit import METHODS, combine, list_matrices, select_matrices
from fasttrace.errors import EditError, PromptError, SiteError

CONCEPT = {"van gogh": "painting"}
FIRST = "text_encoder.encoder.layers.0.self_attn"


def weights(pipe: Any) -> dict[str, Tensor]:
    return {matrix.name: matrix.weight.clone() for matrix in list_matrices(pipe)}


def changed(pipe: Any, before: dict[str, Tensor]) -> set[str]:
    return {m.name for m in list_matrices(pipe) if not torch.equal(m.weight, before[m.name])}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reverts_bit_by_bit(method: str, dtype: torch.dtype) -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15", dtype=dtype)
    before = weights(pipe)
    edit = ft.fit_edit(pipe, CONCEPT, method=method)
    with edit.applied(pipe) as inside:
        assert inside is pipe
        assert changed(pipe, before) == set(edit.recipe.matrices)
        for update in edit.updates:
            matrix = select_matrices(pipe, update.name)[0]
            old, left, right = before[update.name].double(), update.left.double(), update.right.double()
            wide = old + left @ right.T
            # Rounding is relative to the terms, which may cancel in their sum.
            terms = old.abs() + left.abs() @ right.abs().T
            limit = 2 * torch.finfo(dtype).eps * float(terms.max())
            assert float((matrix.weight.double() - wide).abs().max()) <= limit
    assert not changed(pipe, before)


def test_reverts_after_an_exception(tiny: Any) -> None:
    before = weights(tiny)
    edit = ft.fit_edit(tiny, CONCEPT, method="uce")
    with pytest.raises(KeyboardInterrupt), edit.applied(tiny):
        raise KeyboardInterrupt
    assert not changed(tiny, before)


def test_an_update_that_fails_half_way_is_undone(tiny_sd15: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(tiny_sd15)
    edit = ft.fit_edit(tiny_sd15, CONCEPT, method="uce")

    def fails(plain: list[Tensor], *_: Any, **__: Any) -> None:
        plain[0].add_(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fasttrace.edit.update.rank_update", fails)
    with pytest.raises(RuntimeError, match="out of memory"), edit.applied(tiny_sd15):
        pass
    assert not changed(tiny_sd15, before)


def test_nests_on_the_same_matrix(tiny_sd15: Any) -> None:
    before = weights(tiny_sd15)
    one = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST)
    two = ft.fit_edit(tiny_sd15, {"cat": "dog"}, site=FIRST)
    matrix = select_matrices(tiny_sd15, FIRST)[0]
    with one.applied(tiny_sd15):
        once = matrix.weight.clone()
        with two.applied(tiny_sd15):
            update = two.updates[0]
            torch.testing.assert_close(matrix.weight, once + update.left @ update.right.T)
        assert torch.equal(matrix.weight, once)
    assert not changed(tiny_sd15, before)


def test_reverting_out_of_order_is_refused(tiny_sd15: Any) -> None:
    before = weights(tiny_sd15)
    edit = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST)
    first, second = edit.apply(tiny_sd15), edit.apply(tiny_sd15)
    with pytest.raises(EditError, match="revert the last one first"):
        first.revert()
    second.revert()
    first.revert()
    first.revert()
    assert not changed(tiny_sd15, before)


def test_version_counters_move_at_both_ends(tiny_sd15: Any) -> None:
    matrix = select_matrices(tiny_sd15, FIRST)[0]
    edit = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST)
    versions = [matrix.weight._version]
    with edit.applied(tiny_sd15):
        versions.append(matrix.weight._version)
    versions.append(matrix.weight._version)
    assert versions[0] < versions[1] < versions[2]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_save_and_load(tiny: Any, tmp_path: Path, method: str) -> None:
    # Labels that an edit does not read are not kept either: what is loaded equals what was fitted.
    pair = (
        ft.Prompt("a cat and a cat", "cat", span=(12, 15), id="x", attribute="y"),
        ft.Prompt("a cat and a dog", "dog"),
    )
    concepts = CONCEPT if method in ("uce", "time") else [pair]
    edit = ft.fit_edit(tiny, concepts, method=method, preserve=["monet"], captions=["a red apple"])
    loaded = ft.load_edit(edit.save(tmp_path / "edit"))
    assert loaded.recipe == edit.recipe
    for mine, theirs in zip(edit.updates, loaded.updates, strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.left, theirs.left)
        assert torch.equal(mine.right, theirs.right)
    with edit.applied(tiny):
        direct = weights(tiny)
    with loaded.applied(tiny):
        assert not changed(tiny, direct)
    joint = combine(tiny, [loaded])
    assert all(torch.equal(a.left, b.left) for a, b in zip(joint.updates, edit.updates, strict=True))


def test_an_edit_for_another_model_is_refused(tiny_sd15: Any, tiny_sdxl: Any, tmp_path: Path) -> None:
    other = ft.zoo.random_pipeline("tiny-sd15", seed=1)
    before, edit = weights(other), ft.fit_edit(tiny_sd15, CONCEPT)
    loaded = ft.load_edit(edit.save(tmp_path))
    for pipe in (other, tiny_sdxl):
        with pytest.raises(EditError, match="for another model"), loaded.applied(pipe):
            pass
    cross = ft.fit_edit(tiny_sd15, CONCEPT, method="uce")
    with pytest.raises(EditError, match="for another model"), cross.applied(tiny_sdxl):
        pass
    assert not changed(other, before)


def test_an_edit_of_float32_is_recognised_in_half_precision(tiny_sd15: Any) -> None:
    edit = ft.fit_edit(tiny_sd15, CONCEPT, method="uce")
    for dtype in (torch.float16, torch.bfloat16):
        with edit.applied(ft.zoo.random_pipeline("tiny-sd15", dtype=dtype)):
            pass


def test_unreadable_folders(tiny_sd15: Any, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no edit in"):
        ft.load_edit(tmp_path)
    folder = ft.fit_edit(tiny_sd15, CONCEPT).save(tmp_path / "edit")
    table = json.loads((folder / "edit.json").read_text())
    for broken in ({**table, "format": "fasttrace edit 99"}, {"format": table["format"]}):
        (folder / "edit.json").write_text(json.dumps(broken))
        with pytest.raises(EditError, match=r"expected 'fasttrace edit 1'|cannot be read"):
            ft.load_edit(folder)
    (folder / "edit.json").write_text(json.dumps(table))
    (folder / "factors.safetensors").write_bytes(b"not tensors")
    with pytest.raises(EditError, match="cannot be read"):
        ft.load_edit(folder)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"concepts": {}}, EditError, "no concepts"),
    ({"concepts": {"cat": "cat"}}, EditError, "nothing to edit"),
    ({"concepts": {"": "dog"}}, PromptError, "empty"),
    ({"concepts": {"cat": 3}}, EditError, "3 among the concepts .*: expected words"),
    ({"preserve": ["monet", "van gogh"]}, EditError, "'van gogh' .* is both edited and preserved"),
    ({"preserve": [None]}, EditError, "None among the concepts .*: expected words"),
    ({"site": []}, EditError, "no sites to edit: expected at least one name"),
    ({"concepts": [("cat", "dog")]}, EditError, "pair of Prompts"),
    ({"templates": ("a photo",)}, EditError, "expected one"),
    ({"templates": ("{} and {}",)}, EditError, "expected one"),
    ({"templates": "{}"}, EditError, "list of sentences"),
    ({"templates": ("word " * 80 + "{}",)}, PromptError, "cut off"),
    ({"ridge": -1.0}, EditError, "ridge=-1.0"),
    ({"ridge": 0.0, "concepts": {"van gogh": "painting", "van  gogh": "dog"}}, EditError, "depend on each other"),
    ({"mode": "released"}, EditError, "expected one of corrected, release"),
    ({"mode": "release", "method": "uce"}, EditError, "has no such mode"),
    ({"method": "esd"}, EditError, "expected one of quickfix"),
    ({"positions": "all"}, EditError, "expected one of subject_last"),
    ({"preserve": "cat"}, EditError, "list of words"),
    ({"captions": "a cat"}, EditError, "list of prompts"),
    ({"site": "text_encoder.encoder.layers.9.mlp"}, SiteError, "nearest"),
    ({"site": "text_encoder.encoder.layers.0"}, EditError, "no weight"),
    ({"site": "unet.mid_block.resnets.0"}, EditError, "no weight"),
    ({"site": "unet.*.attn2"}, EditError, "use one of time, uce"),
    ({"site": FIRST, "method": "uce"}, EditError, "use one of quickfix"),
    ({"site": f"{FIRST}.k_proj", "method": "memit"}, EditError, "does not write to the hidden state"),
    ({"site": "auto", "method": "uce"}, EditError, "chooses a text site"),
    ({"gram": torch.eye(5)}, EditError, "gram is 5 wide"),
    ({"gram": {"nothing": torch.eye(32)}}, EditError, "not among the edited matrices"),
    ({"gram": {FIRST: torch.eye(32)}, "method": "uce"}, EditError, "share their keys"),
    ({"site": "text_encoder.*.mlp", "gram": torch.eye(64)}, EditError, "different keys"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(tiny_sd15: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    before = weights(tiny_sd15)
    with pytest.raises(error, match=message):
        ft.fit_edit(tiny_sd15, **{"concepts": CONCEPT, **arguments})
    assert not changed(tiny_sd15, before)


@pytest.mark.parametrize(
    ("old", "new", "rule", "message"),
    [
        (("a cat and a cat", "cat"), ("a dog and a cat", "dog"), "subject_last", "occurs 2 times in one and 1"),
        (("a cat and a cat", "cat"), ("a dog and a dog", "dog"), "subject_last_to_end", "give span="),
        (("a cat on snow", "cat"), ("a dog", "dog"), "subject_last_to_end", "2 tokens follow"),
        (("a cat", "cat"), ("a red dog", "dog"), "aligned", "2 tokens precede"),
    ],
)
def test_spans_that_do_not_align(
    tiny_sd15: Any, old: tuple[str, str], new: tuple[str, str], rule: Any, message: str
) -> None:
    with pytest.raises(EditError, match=message):
        ft.fit_edit(tiny_sd15, [(ft.Prompt(*old), ft.Prompt(*new))], positions=rule)


def test_what_several_edits_share_counts_once(tiny_sd15: Any) -> None:
    """A sentence is the same with or without labels, and with its subject's place given or found."""
    labelled = ft.Prompt("van gogh", "van gogh", attribute="style"), ft.Prompt("painting", "painting", id="x")
    kept = ft.Prompt("monet", "monet", seeds=(4,))
    one = ft.fit_edit(tiny_sd15, CONCEPT, preserve=["monet"])
    joint = combine(tiny_sd15, [one, ft.fit_edit(tiny_sd15, [labelled], preserve=[kept, "monet"])])
    assert (len(joint.recipe.pairs), len(joint.recipe.preserve)) == (1, 1)
    assert torch.equal(joint.updates[0].left, one.updates[0].left)


def test_edits_that_cannot_be_combined(tiny_sd15: Any) -> None:
    one = ft.fit_edit(tiny_sd15, CONCEPT)
    with pytest.raises(EditError, match="differ in ridge"):
        combine(tiny_sd15, [one, ft.fit_edit(tiny_sd15, {"cat": "dog"}, ridge=0.5)])
    with pytest.raises(EditError, match="to be read both as"):
        combine(tiny_sd15, [one, ft.fit_edit(tiny_sd15, {"van gogh": "dog"})])
    labelled = ft.Prompt("van gogh", "van gogh", attribute="style", id="artist", seeds=(1,))
    with pytest.raises(EditError, match="to be read both as"):
        combine(tiny_sd15, [one, ft.fit_edit(tiny_sd15, [(labelled, ft.Prompt("dog", "dog"))])])
    with pytest.raises(EditError, match="is both edited and preserved"):
        combine(tiny_sd15, [one, ft.fit_edit(tiny_sd15, {"cat": "dog"}, preserve=["van gogh"])])
    with pytest.raises(EditError, match="give it again"):
        combine(tiny_sd15, [ft.fit_edit(tiny_sd15, CONCEPT, gram=torch.eye(32))])
    with pytest.raises(EditError, match="at least one"):
        combine(tiny_sd15, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_saved_edit_with_absurd_factors_is_refused(tiny_sd15: Any, tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    ft.fit_edit(tiny_sd15, {"apple": "pizza"}).save(tmp_path)
    file = tmp_path / "factors.safetensors"
    tensors = load_file(file)
    tensors["left.0"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(EditError, match="not finite, above"):
        ft.load_edit(tmp_path)


def test_a_saved_edit_that_lost_its_matrices_is_refused(tiny_sd15: Any, tmp_path: Path) -> None:
    ft.fit_edit(tiny_sd15, {"apple": "pizza"}, method="uce").save(tmp_path)
    file = tmp_path / "edit.json"
    table = json.loads(file.read_text())
    table["matrices"].popitem()
    file.write_text(json.dumps(table))
    with pytest.raises(EditError, match="of its"):
        ft.load_edit(tmp_path)
