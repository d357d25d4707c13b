"""`FastIntervenable` against pyvene's own ``IntervenableModel``, side by side on random tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace.errors import BackendError, FasttraceError
from tests.backends.language_models import VOCABULARY, language_model

pv = pytest.importorskip("pyvene", reason="needs the backends extra: pip install 'fasttrace[backends]'")
backend = pytest.importorskip("fasttrace.backends.pyvene")

FAMILIES = ("gpt2", "llama", "qwen2", "trained gpt2")
BATCH, LENGTH, WIDTH = 2, 8, 32


def inputs(seed: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids}


def component(kind: str, layer: int, intervention: Any, **options: Any) -> dict[str, Any]:
    return {"layer": layer, "component": kind, "unit": "pos", "intervention_type": intervention, **options}


def head(unit: str, intervention: Any) -> dict[str, Any]:
    return {**component("head_attention_value_output", 1, intervention, max_number_of_units=1), "unit": unit}


def heads_at(
    heads: list[int], positions: list[int], base_heads: list[int] | None = None, base_positions: list[int] | None = None
) -> dict[str, Any]:
    """Heads and positions of the sources, and of the base if they are others."""
    source = [[[heads] * BATCH, [positions] * BATCH]]
    return {"sources->base": (source, [[[base_heads or heads] * BATCH, [base_positions or positions] * BATCH]])}


BY_POSITION = {"sources->base": ([[[1], [2]], [[5], [5]]], [[[3], [2]], [[5], [6]]])}
FOUR = {"base": [[[1, 2, 3, 4]] * BATCH]}

CASES: dict[str, tuple[list[dict[str, Any]], Any, Any]] = {
    "interchange, one position": ([component("block_output", 1, pv.VanillaIntervention)], {"sources->base": 4}, 1),
    "interchange, other position": ([component("mlp_output", 0, pv.VanillaIntervention)], {"sources->base": (2, 5)}, 1),
    "interchange, several units": (
        [component("attention_output", 1, pv.VanillaIntervention, max_number_of_units=3)],
        {"sources->base": [1, 4, 6]},
        1,
    ),
    "interchange, two sources": (
        [component("block_output", 0, pv.VanillaIntervention), component("mlp_output", 2, pv.VanillaIntervention)],
        BY_POSITION,
        2,
    ),
    "a block's input": ([component("block_input", 2, pv.VanillaIntervention)], {"sources->base": 3}, 1),
    "the attention's result, before its projection": (
        [component("attention_value_output", 1, pv.VanillaIntervention)],
        {"sources->base": (2, 5)},
        1,
    ),
    "addition there": ([component("attention_value_output", 2, pv.AdditionIntervention)], {"sources->base": 4}, 1),
    "one head": ([head("h.pos", pv.VanillaIntervention)], heads_at([1], [4]), 1),
    "other head, other position": ([head("h.pos", pv.VanillaIntervention)], heads_at([1], [4], [3], [6]), 1),
    "several heads and positions": ([head("h.pos", pv.VanillaIntervention)], heads_at([0, 2], [3, 4, 5]), 1),
    "a head at all positions": ([head("h", pv.VanillaIntervention)], {"sources->base": ([[[2]] * 2], [[[1]] * 2])}, 1),
    "a head zeroed": ([head("h.pos", pv.ZeroIntervention)], {"base": heads_at([1], [4])["sources->base"][1]}, 0),
    "a head zeroed at all positions": ([head("h", pv.ZeroIntervention)], {"base": [[[1]] * BATCH]}, 0),
    "addition to a head": ([head("h.pos", pv.AdditionIntervention)], heads_at([1], [4]), 1),
    "subtraction from heads": ([head("h", pv.SubtractionIntervention)], {"sources->base": ([[[2, 3]] * 2],) * 2}, 1),
    "noise on heads": (
        [head("h.pos", pv.NoiseIntervention)],
        {"base": heads_at([1, 2], [1, 2, 3, 4])["sources->base"][1]},
        0,
    ),
    "a head and a block": (
        [head("h.pos", pv.VanillaIntervention), component("block_output", 2, pv.VanillaIntervention)],
        {"sources->base": ([heads_at([1], [4])["sources->base"][0][0], [[5]] * BATCH],) * 2},
        2,
    ),
    "zero": ([component("attention_output", 1, pv.ZeroIntervention)], {"base": 4}, 0),
    "noise": ([component("block_output", 0, pv.NoiseIntervention)], FOUR, 0),
    "addition": ([component("mlp_output", 1, pv.AdditionIntervention)], {"sources->base": 4}, 1),
    "subtraction": ([component("block_output", 1, pv.SubtractionIntervention)], {"sources->base": 4}, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_every_intervention_equals_pyvenes_own(family: str, case: str) -> None:
    model = language_model(family, torch.float32)
    representations, locations, count = CASES[case]
    base, sources = inputs(0), [inputs(seed + 1) for seed in range(count)] or None
    config = pv.IntervenableConfig(representations)
    with torch.no_grad():
        _, expected = pv.IntervenableModel(config, model)(base, sources, locations)
        plain = model(**base).logits
    _, found = backend.FastIntervenable(config, model)(base, sources, locations)
    scale = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5 * scale)
    assert (expected.logits - plain).abs().max() > 1e-2 * scale, "the intervention must matter"


def test_given_representations_take_the_place_of_sources() -> None:
    model, base = language_model("llama", torch.float32), inputs(0)
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    own, ours = pv.IntervenableModel(config, model), backend.FastIntervenable(config, model)
    values = torch.randn(BATCH, 1, WIDTH)
    for given in (values, [values], {own.sorted_keys[0]: values}):
        # Ours goes first: pyvene empties a dictionary that it is given.
        _, found = ours(base, None, {"sources->base": (None, 3)}, source_representations=given)
        with torch.no_grad():
            _, expected = own(base, None, {"sources->base": (None, 3)}, source_representations=given)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-4)


def test_a_compiled_model_is_called_uncompiled_where_sources_are_read() -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("what is compiled was called, which knows none of the hooks")

    model = copy.deepcopy(language_model("gpt2", torch.float32))
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    call = inputs(0), [inputs(1)], {"sources->base": 4}
    expected = backend.FastIntervenable(config, model)(*call)[1].logits
    model._compiled_call_impl = never
    found = backend.FastIntervenable(config, model)(*call)[1].logits
    assert torch.equal(found, expected)
    assert model._compiled_call_impl is never


def test_outputs_come_in_pyvenes_forms() -> None:
    model, base, source = language_model("gpt2", torch.float32), inputs(0), inputs(1)
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    call = {"base": base, "sources": [source], "unit_locations": {"sources->base": 4}, "output_original_output": True}
    found = backend.FastIntervenable(config, model)(**call, return_dict=True)
    with torch.no_grad():
        expected = pv.IntervenableModel(config, model)(**call, return_dict=True)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.original_outputs.logits, expected.original_outputs.logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        found.intervened_outputs.logits, expected.intervened_outputs.logits, rtol=1e-5, atol=1e-4
    )


def test_a_sweep_equals_its_cells_whatever_the_batch_size() -> None:
    model, base, source = language_model("gpt2", torch.float32), inputs(0), inputs(1)
    cells = [
        (pv.IntervenableConfig([component(kind, layer, pv.VanillaIntervention)]), {"sources->base": position})
        for kind in ("block_output", "mlp_output")
        for layer in range(3)
        for position in range(LENGTH)
    ]
    sweeps = [list(backend.intervene_many(model, cells, base, source, batch_size=size)) for size in (5, 100)]
    assert len(sweeps[0]) == len(cells)
    for number, (config, locations) in enumerate(cells):
        with torch.no_grad():
            _, expected = pv.IntervenableModel(config, model)(base, [source], locations)
        for sweep in sweeps:
            torch.testing.assert_close(sweep[number], expected.logits, rtol=1e-5, atol=1e-4)
    for read in ([-1], [2, -3, 5]):
        some = list(backend.intervene_many(model, cells[:20], base, source, logit_positions=read))
        for one, everywhere in zip(some, sweeps[0][:20], strict=True):
            torch.testing.assert_close(one, everywhere[:, read], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("read", [[], [8], [-9, 0]], ids=str)
def test_tokens_that_no_prompt_has_cannot_be_read(read: list[int]) -> None:
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    sweep = backend.intervene_many(
        language_model("gpt2", torch.float32), [(config, {"sources->base": 4})], inputs(0), inputs(1),
        logit_positions=read,
    )  # fmt: skip
    with pytest.raises(BackendError, match=r"prompt of 8 tokens, from -8 to 7"):
        list(sweep)


OUT_OF_RANGE = {
    "source position": ("block_output", {"sources->base": (8, 3)}, "source position 8 .*expected 0 to 7"),
    "base position": ("block_output", {"sources->base": (3, 9)}, "position 9 .*expected 0 to 7"),
    "position from the end": ("block_output", {"sources->base": (-1, 3)}, "source position -1 .*expected 0 to 7"),
    "head": ("head", heads_at([1], [4], [4]), "head 4 .*expected 0 to 3"),
    "no source position": ("block_output", {"base": 3}, "no positions in its source"),
    "head's position": ("head", heads_at([1], [12]), "position 12 .*expected 0 to 7"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_a_location_out_of_range_is_named(case: str) -> None:
    kind, locations, message = OUT_OF_RANGE[case]
    vanilla = pv.VanillaIntervention
    config = pv.IntervenableConfig([head("h.pos", vanilla) if kind == "head" else component(kind, 1, vanilla)])
    fast = backend.FastIntervenable(config, language_model("gpt2", torch.float32))
    with pytest.raises(FasttraceError, match=message):
        fast(inputs(0), [inputs(1)], locations)


def test_a_config_as_patches_gives_the_same_states() -> None:
    model, base, source = language_model("llama", torch.float32), inputs(0), inputs(1)
    config = pv.IntervenableConfig(
        [component("block_output", 1, pv.VanillaIntervention), component("mlp_output", 2, pv.ZeroIntervention)]
    )
    locations = {"sources->base": ([[[4]], None], [[[4]], [[5]]])}
    patches = backend.to_patches(config, locations, model)
    assert [(p.positions, p.source) for p in patches] == [((4,), "source0"), ((5,), ft.ZERO)]
    trace = ft.trace_text(
        model, base["input_ids"][0], [patches], torch.zeros(LENGTH, WIDTH), base="clean",
        sources={"source0": source["input_ids"][0]},
    )  # fmt: skip
    one = {"input_ids": base["input_ids"][:1]}
    both = ([[[4]], [[5]]], [[[4]], [[5]]])
    with torch.no_grad():
        sources = [{"input_ids": source["input_ids"][:1]}] * 2
        _, expected = pv.IntervenableModel(config, model)(one, sources, {"sources->base": both})
        found = model.lm_head(trace.restored[0])
    torch.testing.assert_close(found, expected.logits[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(BackendError, match="FastIntervenable"):
        backend.to_patches(config, {"sources->base": ([[[3]], [[5]]], [[[4]], [[5]]])}, model)


@pytest.mark.parametrize("unit", ["h", "h.pos"])
def test_heads_as_patches_give_the_same_states(unit: str) -> None:
    model, base, source = language_model("llama", torch.float32), inputs(0), inputs(1)
    config = pv.IntervenableConfig([head(unit, pv.VanillaIntervention)])
    at = [[[1, 3]] * BATCH] if unit == "h" else heads_at([1, 3], [4])["sources->base"][0]
    patches = backend.to_patches(config, {"sources->base": (at, at)}, model)
    attention = "model.layers.1.self_attn"
    assert [p.site for p in patches] == [f"{attention}.heads.1", f"{attention}.heads.3"]
    trace = ft.trace_text(
        model, base["input_ids"][0], [patches], torch.zeros(LENGTH, WIDTH), base="clean",
        sources={"source0": source["input_ids"][0]},
    )  # fmt: skip
    with torch.no_grad():
        _, expected = pv.IntervenableModel(config, model)(base, [source], {"sources->base": (at, at)})
        found = model.lm_head(trace.restored[0])
    torch.testing.assert_close(found, expected.logits[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_read_no_padding(side: str) -> None:
    model, base, source = language_model("llama", torch.float32), inputs(0), inputs(1)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    mask = mask.flip(1) if side == "right" else mask
    base, source = base | {"attention_mask": mask}, source | {"attention_mask": mask}
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    with torch.no_grad():
        _, expected = pv.IntervenableModel(config, model)(base, [source], {"sources->base": 4})
    _, found = backend.FastIntervenable(config, model)(base, [source], {"sources->base": 4})
    real = mask.bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-4)


def test_sources_come_in_any_sequence_and_of_as_many_prompts() -> None:
    model, base, source = language_model("gpt2", torch.float32), inputs(0), inputs(1)
    fast = backend.FastIntervenable(
        pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)]), model
    )
    listed, *others = (fast(base, given, {"sources->base": 4})[1].logits for given in ([source], (source,), source))
    assert all(torch.equal(other, listed) for other in others)
    with pytest.raises(BackendError, match="a source has 1 prompts"):
        fast(base, [{"input_ids": source["input_ids"][:1]}], {"sources->base": 4})


def test_the_users_model_stays_as_it_is() -> None:
    model = language_model("gpt2", torch.float32)
    parameter = model.transformer.h[0].mlp.c_fc.weight
    parameter.requires_grad_(True)
    handle = model.transformer.h[1].register_forward_hook(lambda *_: None)
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)])
    backend.FastIntervenable(config, model)(inputs(0), [inputs(1)], {"sources->base": 4})
    assert parameter.requires_grad
    assert list(model.transformer.h[1]._forward_hooks) == [handle.id]
    handle.remove()
    parameter.requires_grad_(False)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The packaged text encoder, made known to pyvene as its documentation says to."""
    from pyvene.models import modeling_utils
    from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

    encoder = ft.load_pipeline("emoji").text_encoder
    layer, out = "encoder.layers[%s]", CONST_OUTPUT_HOOK
    split = (modeling_utils.split_head_and_permute, "n_head")
    modules = {
        "block_input": (layer, CONST_INPUT_HOOK),
        "block_output": (layer, out),
        "attention_output": (f"{layer}.self_attn", out),
        "mlp_output": (f"{layer}.mlp", out),
        "attention_value_output": (f"{layer}.self_attn.out_proj", CONST_INPUT_HOOK),
        "head_attention_value_output": (f"{layer}.self_attn.out_proj", CONST_INPUT_HOOK, split),
    }
    dimensions = dict.fromkeys(modules, ("hidden_size",)) | {
        "n_head": ("num_attention_heads",),
        "head_attention_value_output": ("hidden_size/num_attention_heads",),
    }
    monkeypatch.setitem(modeling_utils.type_to_module_mapping, type(encoder), modules)
    monkeypatch.setitem(modeling_utils.type_to_dimension_mapping, type(encoder), dimensions)
    return encoder


@pytest.mark.parametrize(
    "case", [case for case in CASES if "head" not in case or case in ("one head", "addition to a head")]
)
def test_every_intervention_on_the_packaged_text_encoder(registered: Any, case: str) -> None:
    representations, locations, count = CASES[case]
    size = registered.config.vocab_size
    base, *sources = ({"input_ids": inputs(seed)["input_ids"] % size} for seed in range(count + 1))
    config = pv.IntervenableConfig(representations)
    with torch.no_grad():
        _, expected = pv.IntervenableModel(config, registered)(base, sources or None, locations)
        plain = registered(**base).last_hidden_state
    _, found = backend.FastIntervenable(config, registered)(base, sources or None, locations)
    scale = plain.abs().max().item()
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5 * scale)
    assert (expected.last_hidden_state - plain).abs().max() > 1e-3 * scale, "the intervention must matter"


REFUSED = {
    "component": component("query_output", 1, pv.VanillaIntervention),
    "first block's input": component("block_input", 0, pv.VanillaIntervention),
    "intervention": component("block_output", 1, pv.RotatedSpaceIntervention),
    "collect": component("block_output", 1, pv.CollectIntervention),
    "query heads": {**component("head_query_output", 1, pv.VanillaIntervention), "unit": "h.pos"},
    "heads by position only": component("head_attention_value_output", 1, pv.VanillaIntervention),
    "subspace": component("block_output", 1, pv.VanillaIntervention, subspace_partition=[[0, 4]]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_names_pyvenes_own_class(case: str) -> None:
    with pytest.raises(BackendError, match=r"pyvene\.IntervenableModel"):
        backend.FastIntervenable(pv.IntervenableConfig([REFUSED[case]]), language_model("gpt2", torch.float32))


def test_serial_mode_is_refused() -> None:
    config = pv.IntervenableConfig([component("block_output", 1, pv.VanillaIntervention)], mode="serial")
    with pytest.raises(BackendError, match="serial"):
        backend.FastIntervenable(config, language_model("gpt2", torch.float32))
