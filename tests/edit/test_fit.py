"""Fits against the ridge problem written out in float64 from keys and values that plain hooks record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.edit import METHODS, combine, key_gram, list_matrices, select_matrices
from fasttrace.edit.concepts import RELEASE_TEMPLATES
from fasttrace.edit.fit import CAPTION_WEIGHT
from fasttrace.edit.keys import text_states
from fasttrace.edit.rece import adversarial_states, weight_gram
from fasttrace.edit.ridge import reference
from fasttrace.engine.values import first
from fasttrace.errors import EditError
from fasttrace.zoo.offline_tokenizer import offline_tokenizer
from tests.pipelines import tiny_pipeline

CONCEPT = {"van gogh": "painting"}
FIRST = "text_encoder.encoder.layers.0.self_attn"


def recorded(pipe: Any, part: str, module: torch.nn.Module, text: str) -> tuple[Tensor, Tensor]:
    """A projection's input and output for a whole padded sentence, ``[T, K]`` and ``[T, N]``."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.extend([args[0][0], output[0]]))
    tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
    encoded = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        getattr(pipe, part)(encoded.input_ids)
    handle.remove()
    return seen[0], seen[1]


def edited(edit: Any, pipe: Any, name: str) -> Tensor:
    matrix = select_matrices(pipe, name)[0]
    with edit.applied(pipe):
        return matrix.weight.clone()


def hook_count(pipe: Any) -> int:
    parts = [getattr(pipe, part, None) for part in ("text_encoder", "text_encoder_2", "unet")]
    modules = [module for part in parts if part is not None for module in part.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def test_a_compiled_encoder_is_called_uncompiled_and_stays_compiled() -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("what is compiled was called, which knows none of the hooks")

    pipe = ft.zoo.random_pipeline("tiny-sd15")
    name = "text_encoder.encoder.layers.1.mlp.fc2"
    before = edited(ft.fit_edit(pipe, CONCEPT, site=name), pipe, name)
    pipe.text_encoder._compiled_call_impl = never
    assert torch.equal(edited(ft.fit_edit(pipe, CONCEPT, site=name), pipe, name), before)
    assert pipe.text_encoder._compiled_call_impl is never


@pytest.mark.parametrize("projection", ["self_attn.out_proj", "self_attn.k_proj", "mlp.fc1", "mlp.fc2"])
def test_corrected_mode(tiny: Any, projection: str) -> None:
    for part in [p for p in ("text_encoder", "text_encoder_2") if getattr(tiny, p, None) is not None]:
        name = f"{part}.encoder.layers.1.{projection}"
        edit = ft.fit_edit(tiny, CONCEPT, ("a photo of {} on a table",), site=name)
        matrix = select_matrices(tiny, name)[0]
        # "a photo of van gogh on a table": the subject's last token is the fifth word, then the fourth.
        key = recorded(tiny, part, matrix.module, "a photo of van gogh on a table")[0][5]
        target = recorded(tiny, part, matrix.module, "a photo of painting on a table")[0][4]
        value = matrix.weight.double() @ target.double()
        expected = reference(matrix.weight, key[:, None], value[:, None], 0.01)
        assert edit.rank == 1
        assert relative(edited(edit, tiny, name), expected) <= 1e-6


def test_release_mode_takes_291_keys_and_values_with_the_bias() -> None:
    # One layer of CLIP's true length; "van gogh" is two tokens and "painting" one, as in CLIP's own tokenizer.
    pipe = tiny_pipeline("tiny-sd15")
    words = "van gogh painting a an of photo image picture"
    tokenizer, pipe.tokenizer = pipe.tokenizer, offline_tokenizer(1000, words=words)
    try:
        edit = ft.fit_edit(pipe, CONCEPT, mode="release")
        matrix = select_matrices(pipe, FIRST)[0]
        keys, values = [], []
        for template in RELEASE_TEMPLATES:
            lead = len(template.split()) - 1
            key = recorded(pipe, "text_encoder", matrix.module, template.format("van gogh"))[0][lead + 2 :]
            value = recorded(pipe, "text_encoder", matrix.module, template.format("painting"))[1][lead + 1 :]
            keys.append(key)
            values.append(value[: len(key)])
        stacked, wanted = torch.cat(keys).T, torch.cat(values).T
        assert stacked.shape[1] == 291
        expected = reference(matrix.weight, stacked, wanted, 0.01)
        assert relative(edited(edit, pipe, FIRST), expected) <= 2e-6  # the values themselves are rounded to float32
    finally:
        pipe.tokenizer = tokenizer


@pytest.mark.parametrize("layer", [0, 1])
def test_no_layer_above_the_edited_one_is_computed(tiny: Any, layer: int) -> None:
    counts: dict[str, int] = {}
    handles = [
        site.module.register_forward_pre_hook(lambda *_, name=site.name: counts.update({name: counts.get(name, 0) + 1}))
        for site in ft.discover_sites(tiny)
        if site.kind == "hidden" or site.part == "unet"
    ]
    ft.fit_edit(tiny, CONCEPT, site=f"text_encoder.encoder.layers.{layer}.mlp")
    for handle in handles:
        handle.remove()
    assert counts == {f"text_encoder.encoder.layers.{i}": 2 for i in range(layer + 1)}


def test_a_fit_leaves_no_hooks_and_no_change(tiny: Any) -> None:
    text_states(tiny, ["a"])  # transformers installs hooks of its own when hidden states are first asked for
    before, hooks = {m.name: m.weight.clone() for m in list_matrices(tiny)}, hook_count(tiny)
    for method in METHODS:
        ft.fit_edit(tiny, CONCEPT, method=method)
    assert all(torch.equal(before[m.name], m.weight) for m in list_matrices(tiny))
    assert hook_count(tiny) == hooks


@pytest.mark.parametrize("method", ["uce", "locoedit", "time"])
def test_cross_attention(tiny: Any, method: str) -> None:
    kept = ["monet"] if method == "uce" else []
    edit = ft.fit_edit(tiny, CONCEPT, ("{}", "a {} cat"), method=method, preserve=kept)
    matrices = [m for m in list_matrices(tiny) if not m.is_text]
    assert [u.name for u in edit.updates] == [m.name for m in matrices]
    assert len({id(u.right) for u in edit.updates}) == 1

    def states(text: str) -> Tensor:
        return text_states(tiny, [text])[0]

    old, new = states("van gogh"), states("painting")
    old2, new2 = states("a van gogh cat"), states("a painting cat")
    if method == "time":
        keys = torch.cat([old[:1], old[2:], old2[:2], old2[3:]])
        targets = torch.cat([new[:1], new[1:-1], new2[:2], new2[2:-1]])
    else:
        keys, targets = torch.stack([old[2], old2[3]]), torch.stack([new[1], new2[2]])
    if kept:
        same = torch.stack([states("monet")[1], states("a monet cat")[2]])
        keys, targets = torch.cat([keys, same]), torch.cat([targets, same])
    for matrix in (matrices[0], matrices[-1]):
        values = matrix.weight.double() @ targets.double().T
        expected = reference(matrix.weight, keys.T, values, METHODS[method].ridge)
        assert relative(edited(edit, tiny, matrix.name), expected) <= 1e-6


def test_sdxl_edits_both_encoders_and_all_of_cross_attention(tiny_sdxl: Any) -> None:
    text = ft.fit_edit(tiny_sdxl, CONCEPT)
    assert [u.name for u in text.updates] == [f"{FIRST}.out_proj", f"{FIRST}.out_proj".replace("coder.", "coder_2.", 1)]
    blocks = [s for s in ft.discover_sites(tiny_sdxl) if s.kind == "cross_attn"]
    assert len(ft.fit_edit(tiny_sdxl, CONCEPT, method="uce").updates) == 2 * len(blocks)


def test_true_sdxl_has_140_cross_attention_matrices() -> None:
    pipe = ft.zoo.random_pipeline("sdxl", device="meta")
    matrices = [m for m in list_matrices(pipe) if not m.is_text]
    assert len(matrices) == 140
    assert {m.weight.shape[1] for m in matrices} == {2048}


def test_several_concepts_are_fitted_jointly(tiny_sd15: Any) -> None:
    both = ft.fit_edit(tiny_sd15, {"van gogh": "painting", "cat": "dog"}, site=FIRST)
    assert both.rank == 2
    one, two = (ft.fit_edit(tiny_sd15, c, site=FIRST) for c in (CONCEPT, {"cat": "dog"}))
    joint = combine(tiny_sd15, [one, two])
    assert torch.equal(edited(joint, tiny_sd15, FIRST), edited(both, tiny_sd15, FIRST))
    matrix = select_matrices(tiny_sd15, FIRST)[0]
    added = matrix.weight + sum(e.updates[0].left @ e.updates[0].right.T for e in (one, two))
    assert not torch.allclose(added, edited(joint, tiny_sd15, FIRST), atol=1e-4)


def test_preserved_words_keep_their_value_and_gram_equals_pairs(tiny_sd15: Any) -> None:
    matrix = select_matrices(tiny_sd15, FIRST)[0]
    key = recorded(tiny_sd15, "text_encoder", matrix.module, "monet")[0][1]

    def moved(edit: Any) -> float:
        with edit.applied(tiny_sd15):
            changed = matrix.weight @ key
        return float((changed - matrix.weight @ key).norm())

    plain = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST)
    kept = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST, preserve=["monet"])
    by_gram = ft.fit_edit(tiny_sd15, CONCEPT, site=FIRST, gram=torch.outer(key, key))
    assert moved(kept) < 0.1 * moved(plain)
    torch.testing.assert_close(edited(kept, tiny_sd15, FIRST), edited(by_gram, tiny_sd15, FIRST))


CAPTIONS = ["a red apple", "two horses on sand", "Van Gogh by a river", "a red apple"]


@pytest.mark.parametrize("method", ["quickfix", "memit", "time", "uce", "rece"])
def test_captions_are_a_gram_matrix_of_their_keys(tiny: Any, method: str) -> None:
    by_captions = ft.fit_edit(tiny, CONCEPT, method=method, captions=CAPTIONS)
    named = by_captions.recipe.matrices
    grams = {name: CAPTION_WEIGHT * key_gram(tiny, CAPTIONS[:2], name) for name in named}
    shared = METHODS[method].part == "cross_attn"
    by_gram = ft.fit_edit(tiny, CONCEPT, method=method, gram=grams[named[0]] if shared else grams)
    assert by_captions.recipe.captions == ("a red apple", "two horses on sand")
    for name in named:
        torch.testing.assert_close(edited(by_captions, tiny, name), edited(by_gram, tiny, name))
    plain = ft.fit_edit(tiny, CONCEPT, method=method)
    assert not torch.allclose(edited(plain, tiny, named[0]), edited(by_gram, tiny, named[0]), atol=1e-6)


def test_captions_add_to_a_gram_matrix(tiny: Any) -> None:
    name = f"{FIRST}.out_proj"
    given = key_gram(tiny, ["a green door"], name)
    both = ft.fit_edit(tiny, CONCEPT, site=FIRST, captions=CAPTIONS[:2], gram=given)
    summed = given + CAPTION_WEIGHT * key_gram(tiny, CAPTIONS[:2], name)
    torch.testing.assert_close(
        edited(both, tiny, name), edited(ft.fit_edit(tiny, CONCEPT, site=FIRST, gram=summed), tiny, name)
    )


def test_combined_edits_keep_captions_that_name_none_of_their_subjects(tiny: Any) -> None:
    one = ft.fit_edit(tiny, CONCEPT, captions=[*CAPTIONS, "a cat"])
    two = ft.fit_edit(tiny, {"cat": "dog"}, captions=["a house"])
    assert combine(tiny, [one, two]).recipe.captions == ("a red apple", "two horses on sand", "a house")


def test_key_gram_sums_over_all_tokens(tiny: Any) -> None:
    prompts = ["a red apple", "monet"]
    name = f"{FIRST}.out_proj"
    matrix = select_matrices(tiny, name)[0]
    keys = torch.cat([recorded(tiny, "text_encoder", matrix.module, text)[0] for text in prompts]).double()
    torch.testing.assert_close(key_gram(tiny, prompts, name), keys.T @ keys, rtol=1e-5, atol=1e-4)
    states = torch.cat([text_states(tiny, [text])[0] for text in prompts]).double()
    torch.testing.assert_close(key_gram(tiny, prompts, "unet.*attn2"), states.T @ states, rtol=1e-5, atol=1e-4)


def test_explicit_spans(tiny_sd15: Any) -> None:
    text = "a cat and a cat on a table"
    second = (ft.Prompt(text, "cat", span=(12, 15)), ft.Prompt("a cat and a dog on a table", "dog"))
    edit = ft.fit_edit(tiny_sd15, [second], site=FIRST)
    matrix = select_matrices(tiny_sd15, FIRST)[0]
    key = recorded(tiny_sd15, "text_encoder", matrix.module, text)[0][5]
    target = recorded(tiny_sd15, "text_encoder", matrix.module, second[1].text)[0][5]
    expected = reference(matrix.weight, key[:, None], (matrix.weight.double() @ target.double())[:, None], 0.01)
    assert relative(edited(edit, tiny_sd15, FIRST), expected) <= 1e-6


def test_memit_brings_the_last_layer_closer_than_its_first_share(tiny: Any) -> None:
    edit = ft.fit_edit(tiny, CONCEPT, method="memit", site="text_encoder.encoder.layers.*.mlp")
    top = next(s for s in ft.discover_sites(tiny) if s.name == "text_encoder.encoder.layers.2")

    def hidden(text: str, position: int) -> Tensor:
        seen: list[Tensor] = []
        handle = top.module.register_forward_hook(lambda _, args, out: seen.append(first(out)[0]))
        encoded = tiny.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            tiny.text_encoder(encoded.input_ids)
        handle.remove()
        return seen[0][position]

    before, target = hidden("van gogh", 2), hidden("painting", 1)
    with edit.applied(tiny):
        after = hidden("van gogh", 2)
    assert len(edit.updates) == 3
    assert (after - target).norm() < 0.05 * (before - target).norm()


def test_rece_state_minimises_its_objective(tiny_sd15: Any) -> None:
    matrices = [m for m in list_matrices(tiny_sd15) if not m.is_text]
    edit = ft.fit_edit(tiny_sd15, CONCEPT, method="uce")
    change, right = torch.randn(32, 2, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64) / 32
    old = torch.randn(32, 3, dtype=torch.float64)
    gram = weight_gram(matrices)
    state = adversarial_states(gram, change, right, old)
    multiplier = torch.eye(32, dtype=torch.float64) + change @ right.T
    shrink = 1e-3 * gram.trace() / 32
    gradient = shrink * state
    for matrix in matrices:
        weight = matrix.weight.double()
        new = weight @ multiplier
        gradient = gradient + new.T @ (new @ state - weight @ old)
    assert float(gradient.norm() / (gram @ old).norm()) < 1e-6
    assert ft.fit_edit(tiny_sd15, CONCEPT, method="rece").rank == 4 * edit.rank


def test_auto_site_takes_the_strongest(tiny_sd15: Any) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [
        ("text_encoder.encoder.layers.0.self_attn", "text_encoder", "self_attn", "subject_last", 0.2),
        ("text_encoder.encoder.layers.2.mlp", "text_encoder", "mlp", "subject_last", 0.9),
        ("text_encoder.encoder.layers.2.mlp", "text_encoder", "mlp", "bos", -0.9),
        ("text_encoder.encoder.layers.1", "text_encoder", "hidden", "subject_last", 2.0),
        ("unet.mid_block.resnets.0", "unet", "resnet", "all", 3.0),
    ]
    table = pandas.DataFrame(rows, columns=["site", "part", "kind", "token_role", "indirect_effect"])
    table["metric"] = "text_cosine"
    edit = ft.fit_edit(tiny_sd15, CONCEPT, site="auto", effects=table)
    assert edit.recipe.matrices == ("text_encoder.encoder.layers.2.mlp.fc2",)
    doubled = pandas.concat([table, table.assign(metric="text_l2")])
    with pytest.raises(ft.FasttraceError, match="mix the metrics"):
        ft.fit_edit(tiny_sd15, CONCEPT, site="auto", effects=doubled)
    with pytest.raises(ft.FasttraceError, match="needs effects"):
        ft.fit_edit(tiny_sd15, CONCEPT, site="auto")


def test_one_text_is_not_taken_for_a_list_of_prompts(tiny_sd15: Any) -> None:
    with pytest.raises(EditError, match="prompts='a cat': expected a list"):
        key_gram(tiny_sd15, "a cat", FIRST)
