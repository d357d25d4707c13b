"""The packed text engine equals the oracle, for any mix of patches on any family."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fasttrace as ft
from fasttrace.engine.text import attention as suffix_attention
from fasttrace.engine.text import compile as text_compile
from fasttrace.engine.text import linear
from fasttrace.engine.text.packed import forget_plans, plan_of
from fasttrace.engine.text.trace import TextTrace, text_request, trace_logits, trace_text_parts
from fasttrace.sites import head_sites, part_sites
from tests.engine.text_models import ALL, CLIP, EOS, LANGUAGE, LENGTH, T5, VOCABULARY, text_model

WIDTH = 16
IDS = torch.tensor([48, 3, 4, 5, 6, 7, EOS, EOS, EOS])
MASKS = (None, [1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1])

positions = st.one_of(
    st.none(), st.just(()), st.integers(0, LENGTH - 1).map(lambda p: (p,)), st.lists(st.integers(0, LENGTH - 1))
)
seeds = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sources(width: int) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from(("clean", "clean", "corrupted", "other", "late", ft.ZERO)),
        seeds.map(lambda seed: drawn(seed, width)),
        seeds.map(lambda seed: drawn(seed, LENGTH, width)),
        seeds.map(lambda seed: ft.Add(drawn(seed, width))),
        seeds.map(lambda seed: ft.Noise(0.5, seed)),
    )


@st.composite
def runs(draw: st.DrawFn, model: Any) -> list[tuple[ft.Patch, ...]]:
    """Patches of whole sites and of heads, often of several heads of one attention."""
    heads = head_sites(model, "text_encoder")
    width = heads[0].channels.stop
    whole = st.builds(ft.Patch, st.sampled_from(part_sites(model, "text_encoder")), positions, source=sources(WIDTH))
    head = st.builds(ft.Patch, st.sampled_from(heads), positions, source=sources(width))
    return draw(st.lists(st.lists(whole | head, max_size=5).map(tuple), max_size=12))


def noise(seed: int, tokens: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    result = torch.zeros(2, LENGTH, WIDTH, dtype=torch.float64)
    result[0, list(tokens)] = drawn(seed, len(tokens), WIDTH)
    result[1, tokens[0]] = 1.0
    return result


def trace(model: Any, patches: Any, engine: str, **options: Any) -> TextTrace:
    late = IDS.clone()
    late[5] = 11
    other = torch.arange(LENGTH) % VOCABULARY
    given_noise = options.pop("noise", noise(0))
    return ft.trace_text(
        model, IDS, patches, given_noise, sources={"other": other, "late": late}, engine=engine, **options
    )


def assert_equal(fast: TextTrace, oracle: TextTrace, tolerance: float = 1e-12) -> None:
    for name in ("clean", "corrupted", "restored"):
        ours, truth = getattr(fast, name), getattr(oracle, name)
        assert ours.shape == truth.shape
        scale = float(oracle.clean.abs().max())
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mix_of_patches(name: str, data: st.DataObject) -> None:
    model = text_model(name)
    patches = data.draw(runs(model))
    options = {
        "base": data.draw(st.sampled_from(("corrupted", "clean"))),
        "output": data.draw(st.sampled_from(("last", "penultimate", *(("pooled",) if name in CLIP else ())))),
        "attention_mask": data.draw(st.sampled_from(MASKS)),
        "attention": data.draw(st.sampled_from((None, *(() if name in T5 else ("ragged",))))),
        "noise": noise(data.draw(seeds), data.draw(st.sampled_from(((3, 4), (0,), (2, 7), (8,))))),
    }
    assert_equal(trace(model, patches, "fast", **options), trace(model, patches, "oracle", **options))


@pytest.mark.parametrize("name", ["clip", "clip-projection", "t5", "gpt2", "qwen3"])
def test_every_single_cell(name: str) -> None:
    """Each (site, token) and each (head, token), by itself and as the window of three layers from there."""
    model = text_model(name)
    sites = part_sites(model, "text_encoder")
    every = [*sites, *head_sites(model, "text_encoder")]
    cells = [(ft.Patch(site, [token]),) for site in every for token in range(LENGTH)]
    windows = [tuple(ft.Patch(s, [t]) for s in sites[kind::3]) for kind in range(3) for t in range(LENGTH)]
    assert_equal(trace(model, cells + windows, "fast"), trace(model, cells + windows, "oracle"))


@pytest.mark.parametrize("name", ALL)
def test_all_heads_of_an_attention_are_that_attention(name: str) -> None:
    """Its projection is linear: restoring every head restores the whole output."""
    model = text_model(name)
    attention = next(site for site in part_sites(model, "text_encoder") if site.layer == 1)
    heads = [site for site in head_sites(model, "text_encoder") if site.layer == 1]
    assert [head.name for head in heads] == [f"{attention.name}.heads.{n}" for n in range(len(heads))]
    runs = [run for t in range(LENGTH) for run in (ft.Patch(attention, [t]), tuple(ft.Patch(h, [t]) for h in heads))]
    restored = trace(model, runs, "fast").restored
    torch.testing.assert_close(restored[:, ::2], restored[:, 1::2], rtol=1e-12, atol=1e-12)
    assert float((restored - restored[:, :1]).abs().max()) > 1e-3


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["clip", "qwen2", "t5"])
def test_every_way_to_attend(name: str, mask: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged: the call that reaches the Triton kernel on a GPU, here by the op's implementation in torch."""
    model = text_model(name)
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    oracle = trace(model, cells, "oracle", attention_mask=mask)
    monkeypatch.setattr(text_compile, "_ALIGNED", 4)
    for attention in ("grouped", *(() if name in T5 else ("ragged",))):
        forget_plans()
        assert_equal(trace(model, cells, "fast", attention_mask=mask, attention=attention), oracle)


def test_the_ops_plain_reference_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen as a user chooses it."""
    monkeypatch.setenv("FASTTRACE_IMPL", "ragged_prefix_attention=reference")
    calls = []
    op = suffix_attention.ragged_prefix_attention
    monkeypatch.setattr(suffix_attention, "ragged_prefix_attention", lambda *a: calls.append(op.chosen(*a)) or op(*a))
    model = text_model("clip-projection")
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    fast = trace(model, cells, "fast", attention="ragged", noise=noise(0)[:1])
    assert_equal(fast, trace(model, cells, "oracle", noise=noise(0)[:1]))
    assert set(calls) == {"reference"}


@pytest.mark.parametrize("name", ["clip", "clip-legacy", "clip-projection", "t5", "t5-gated", "llama"])
def test_oracles_of_the_design(name: str) -> None:
    """No position gives the base run; hidden states at all positions of one layer give the clean run."""
    model = text_model(name)
    hidden = [site for site in part_sites(model, "text_encoder") if site.kind == "hidden"]
    result = trace(model, [ft.Patch(site, []) for site in hidden] + [ft.Patch(site) for site in hidden], "fast")
    nothing, everything = result.restored[:, : len(hidden)], result.restored[:, len(hidden) :]
    assert float((result.corrupted - result.clean).abs().max()) > 0.01
    torch.testing.assert_close(nothing, result.corrupted[:, None].expand_as(nothing), rtol=0, atol=0)
    torch.testing.assert_close(everything, result.clean.expand_as(everything), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "gpt2"])
def test_tokens_before_the_corruption_cost_nothing(name: str) -> None:
    model = text_model(name)
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(3)]
    plan = plan_of(text_request(model, IDS, cells, noise(0)[0]))
    assert len(plan.idle) == len(cells)
    assert plan.flops(WIDTH, 24) == 0
    result = trace(model, cells, "fast", noise=noise(0)[0])
    torch.testing.assert_close(result.restored, result.corrupted.expand_as(result.restored), rtol=0, atol=0)


def test_the_plan_computes_no_more_than_is_live() -> None:
    """One cell: its own column in its layer, one key and value in the next, then the suffix from its token on."""
    model, layers, token = text_model("clip"), 3, 4
    for layer in range(layers):
        plan = plan_of(text_request(model, IDS, [ft.Patch(f"encoder.layers.{layer}.self_attn", [token])], noise(0)[0]))
        (chunk,) = plan.chunks
        mlp = [len(work.stages[1].computed) for work in chunk.layers]
        keys = [len(work.attention.rows.slots) if work.attention else 0 for work in chunk.layers]
        suffix = LENGTH - token
        assert mlp == [0] * layer + [1] + [suffix] * (layers - 1 - layer)
        assert keys == ([0] * (layer + 1) + [1] + [suffix] * layers)[:layers]


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_results_do_not_depend_on_the_budget_or_on_batch_mates(rows: int) -> None:
    model = text_model("clip")
    sites = part_sites(model, "text_encoder")
    cells = [ft.Patch(site, [token]) for site in sites for token in range(LENGTH)]
    whole = trace(model, cells, "fast")
    assert_equal(trace(model, cells, "fast", max_rows=rows), whole)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(rows))
    some = order[: rows + 1]
    mixed = trace(model, [cells[i] for i in some], "fast", max_rows=rows)
    torch.testing.assert_close(mixed.restored, whole.restored[:, some], rtol=1e-12, atol=1e-12)


def test_parts_and_a_given_output_hold_the_same() -> None:
    model = text_model("clip-projection")
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    whole = trace(model, cells, "fast")
    out = torch.full((2, len(cells), LENGTH, WIDTH), float("nan"), dtype=torch.float64)
    assert trace(model, cells, "fast", out=out).restored.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, whole.restored, rtol=0, atol=0)
    collected = torch.full_like(out, float("nan"))
    for part in trace_text_parts(text_request(model, IDS, cells, noise(0), max_rows=40)):
        collected[part.sample, part.runs] = part.restored
    torch.testing.assert_close(collected, whole.restored, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(skip: int) -> None:
    model = text_model("clip")
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in (3, 6)]
    fast = trace(model, cells, "fast", clip_skip=skip)
    assert_equal(fast, trace(model, cells, "oracle", clip_skip=skip))
    states = model(input_ids=IDS[None], output_hidden_states=True).hidden_states[-(skip + 1)]
    torch.testing.assert_close(fast.clean, model.final_layer_norm(states)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("output", ["last", "penultimate"])
def test_the_state_of_one_token(name: str, output: str) -> None:
    model = text_model(name)
    sites = [*part_sites(model, "text_encoder"), *head_sites(model, "text_encoder")]
    cells = [ft.Patch(site, [token]) for site in sites for token in range(LENGTH)]
    everything = trace(model, cells, "fast", output=output)
    fast, oracle = (trace(model, cells, engine, output=output, position=6) for engine in ("fast", "oracle"))
    assert_equal(fast, oracle)
    torch.testing.assert_close(fast.restored, everything.restored[:, :, 6], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize(("mask", "position"), [(MASKS[0], None), (MASKS[1], None), (MASKS[2], 5)])
def test_logits_of_chosen_answers(name: str, mask: list[int] | None, position: int | None) -> None:
    model = text_model(name)
    cells = [ft.Patch(site, [token]) for site in ft.discover_sites(model) for token in (0, 3, 5, 6, 8)]
    fast, oracle = (
        trace_logits(model, IDS, cells, noise(1), [4, 17], attention_mask=mask, position=position, engine=engine)
        for engine in ("fast", "oracle")
    )
    assert fast.restored.shape == (2, len(cells), 2)
    assert_equal(fast, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip", "clip-projection", "gpt2", "t5", "llama"])
def test_reordered_weights(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of long passes, forced; in bfloat16 it is as near to the truth as the modules are."""
    monkeypatch.setattr(linear, "WORTHWHILE_ROWS", 1)
    model = text_model(name, dtype)
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    fast, oracle = trace(model, cells, "fast"), trace(model, cells, "oracle")
    error, scale = (fast.restored - oracle.restored).abs().max(), oracle.restored.abs().max()
    assert float(error / scale) < (1e-5 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        return
    truth = trace(text_model(name), cells, "oracle").restored
    ours, theirs = ((x.restored.double() - truth).norm() / truth.norm() for x in (fast, oracle))
    assert float(ours) < 1.5 * float(theirs)


def test_hooks_and_adapters_on_submodules_keep_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE_ROWS", 1)
    model = text_model("clip", torch.float32)
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    hooked = [model.encoder.layers[1].mlp.fc1, model.encoder.layers[0].self_attn.v_proj, model.encoder.layers[2].mlp]
    plain = trace(model, cells, "fast")
    handles = [module.register_forward_hook(lambda module, args, output: output * 1.5) for module in hooked]
    try:
        changed = trace(model, cells, "fast")
        assert_equal(changed, trace(model, cells, "oracle"), tolerance=1e-5)
        assert float((changed.restored - plain.restored).abs().max()) > 0.1
    finally:
        for handle in handles:
            handle.remove()
    assert_equal(trace(model, cells, "fast"), plain, tolerance=0)


def test_a_changed_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE_ROWS", 1)
    model = copy.deepcopy(text_model("clip", torch.float32))
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in range(LENGTH)]
    trace(model, cells, "fast")
    model.encoder.layers[1].mlp.fc2.weight.data.mul_(1.5)
    assert_equal(trace(model, cells, "fast"), trace(model, cells, "oracle"), tolerance=1e-5)


def test_a_chosen_dtype_leaves_the_encoder_alone() -> None:
    model = text_model("clip", torch.float32)
    cells = [ft.Patch(site, [5]) for site in part_sites(model, "text_encoder")]
    result = trace(model, cells, "fast", dtype=torch.float64)
    assert result.restored.dtype == torch.float64
    assert model.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert_equal(result, trace(model, cells, "oracle", dtype=torch.float64))


def test_lora_adapters_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(linear, "WORTHWHILE_ROWS", 1)
    plain = text_model("clip", torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(plain)).eval()
    cells = [ft.Patch(site, [token]) for site in part_sites(model, "text_encoder") for token in (3, 6)]
    adapted = trace(model, cells, "fast")
    assert_equal(adapted, trace(model, cells, "oracle"), tolerance=1e-5)
    assert float((adapted.clean - trace(plain, cells, "fast").clean).abs().max()) > 0.01
