"""`generic_activation_patch` against TransformerLens' own, side by side on a bridge over random tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pandas
import pytest
import torch

from tests.backends.language_models import MODELS, VOCABULARY, language_model
from tests.backends.memory import most_bytes

pytest.importorskip("transformer_lens", reason="needs the backends extra: pip install 'fasttrace[backends]'")

from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

from fasttrace.backends import base
from fasttrace.backends import transformer_lens as backend
from fasttrace.errors import BackendError

_bridges: dict[str, Any] = {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bridge asks for a tokenizer that can be loaded again from where it came from."""
    from transformers import AutoTokenizer

    from fasttrace.zoo.offline_tokenizer import offline_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    offline_tokenizer(600).save_pretrained(folder)
    language_model("gpt2").config.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def bridge_of(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(family: str) -> Any:
        if family not in _bridges:
            model = copy.deepcopy(language_model(family, torch.float32))
            model.config.architectures = [type(model).__name__]
            _bridges[family] = TransformerBridge.boot_transformers(
                "tiny", hf_model=model, dtype=torch.float32, device="cpu", tokenizer=tokenizer
            )
        return _bridges[family]

    return make


def prompts(batch: int, seed: int, length: int = 7) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean()


CASES = {
    "resid_pre": ("resid_pre", "layer_pos_patch_setter", ("layer", "pos")),
    "resid_post": ("resid_post", "layer_pos_patch_setter", ("layer", "pos")),
    "attn_out": ("attn_out", "layer_pos_patch_setter", ("layer", "pos")),
    "mlp_out": ("mlp_out", "layer_pos_patch_setter", ("layer", "pos")),
    "z by position": ("z", "layer_pos_patch_setter", ("layer", "pos")),
    "z by head": ("z", "layer_head_vector_patch_setter", ("layer", "head")),
    "z by position and head": ("z", "layer_pos_head_vector_patch_setter", ("layer", "pos", "head_index")),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_sweep_equals_transformer_lens_own(bridge_of: Any, family: str, case: str) -> None:
    bridge, (name, setter, axes) = bridge_of(family), CASES[case]
    clean, corrupted = prompts(2, seed=1), prompts(2, seed=2)
    _, cache = bridge.run_with_cache(clean)
    arguments = (corrupted, cache, logit_difference, getattr(patching, setter), name, axes)
    with torch.no_grad():
        expected = patching.generic_activation_patch(bridge, *arguments)
    found = backend.generic_activation_patch(bridge, *arguments, batch_size=5)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 1e-3, "patches must matter, or the comparison shows nothing"


READY_MADE = (
    "get_act_patch_resid_pre",
    "get_act_patch_attn_out",
    "get_act_patch_mlp_out",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_out_all_pos",
)


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_sweeps_have_their_names(bridge_of: Any, name: str, recwarn: pytest.WarningsRecorder) -> None:
    bridge = bridge_of("trained gpt2")
    _, cache = bridge.run_with_cache(prompts(2, seed=1))
    arguments = (bridge, prompts(2, seed=2), cache, logit_difference)
    with torch.no_grad():
        expected = getattr(patching, name)(*arguments)
    found = getattr(backend, name)(*arguments)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not [each for each in recwarn if "fasttrace" in str(each.message)], "nothing may fall back"


@pytest.mark.parametrize("name", ["get_act_patch_block_every", "get_act_patch_no_such_thing"])
def test_what_is_no_sweep_is_not_here(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(backend, name)


def test_results_of_every_form_are_transformer_lens_own(bridge_of: Any) -> None:
    bridge = bridge_of("gpt2")
    clean, corrupted = prompts(2, seed=1), prompts(2, seed=2)
    _, cache = bridge.run_with_cache(clean)
    table = patching.make_df_from_ranges([3, 7], ["layer", "pos"]).iloc[[4, 0, 11]]
    setter = patching.layer_pos_patch_setter

    def each(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5]

    for options in (
        {"index_df": table, "return_index_df": True},
        {"index_axis_names": ("layer", "pos"), "reduce": "none", "baseline": True},
        {"index_axis_names": ("layer", "pos"), "reduce": "mean", "baseline": True},
    ):
        metric = logit_difference if "index_df" in options else each
        with torch.no_grad():
            expected = patching.generic_activation_patch(
                bridge, corrupted, cache, metric, setter, "attn_out", **options
            )
        found = backend.generic_activation_patch(bridge, corrupted, cache, metric, setter, "attn_out", **options)
        assert type(found) is type(expected)
        if isinstance(found, tuple):
            torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
            assert found[1].equals(expected[1])
        else:
            torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.baseline, expected.baseline, rtol=1e-5, atol=1e-5)
            assert found.axis_names == expected.axis_names


@pytest.mark.parametrize("positions", [[-1], [6, -3], [0, 1, 6]], ids=str)
def test_logits_may_be_read_at_some_tokens_only(bridge_of: Any, positions: list[int]) -> None:
    bridge = bridge_of("gpt2")
    _, cache = bridge.run_with_cache(prompts(1, seed=1))
    arguments = (
        prompts(1, seed=2),
        cache,
        logit_difference,
        patching.layer_pos_patch_setter,
        "mlp_out",
        ("layer", "pos"),
    )
    everything = backend.generic_activation_patch(bridge, *arguments)
    last = backend.generic_activation_patch(bridge, *arguments, logit_positions=positions)
    torch.testing.assert_close(last, everything, rtol=1e-5, atol=1e-5)
    with pytest.raises(BackendError, match="prompt of 7 tokens, from -7 to 6"):
        backend.generic_activation_patch(bridge, *arguments, logit_positions=[7, *positions])


@pytest.mark.parametrize("name", ["mlp_out", "z"])
@pytest.mark.parametrize("positions", [None, [-1]])
def test_a_longer_sweep_takes_no_more_memory(
    bridge_of: Any, name: str, positions: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = bridge_of("gpt2")
    _, cache = bridge.run_with_cache(prompts(2, seed=1, length=24))
    corrupted = prompts(2, seed=2, length=24)
    table = patching.make_df_from_ranges([3, 24], ["layer", "pos"])

    def sweep(times: int, batch_size: int | None) -> int:
        return most_bytes(
            lambda: backend.generic_activation_patch(
                bridge, corrupted, cache, logit_difference, patching.layer_pos_patch_setter, name,
                index_df=pandas.concat([table] * times), batch_size=batch_size, logit_positions=positions,
            )
        )  # fmt: skip

    once = sweep(1, 8)
    assert sweep(3, 8) < 1.2 * once
    budget, one = 2**20, 2 * 24 * VOCABULARY * 4
    monkeypatch.setattr(base, "RUNS_BUDGET", budget - 4 * one)
    monkeypatch.setattr(base, "LOGITS_BUDGET", 2 * one)  # of which two are held: a part that is read, and the next
    unpatched, result = 2 * 24 * 3 * 9 * 32 * 4, 2 * one
    assert budget / 8 < sweep(3, None) < budget + unpatched + result


def test_what_is_not_recognised_runs_in_transformer_lens_with_a_warning(bridge_of: Any) -> None:
    bridge = bridge_of("gpt2")
    _, cache = bridge.run_with_cache(prompts(1, seed=1))

    def own_setter(corrupted: torch.Tensor, index: list[int], clean: torch.Tensor) -> torch.Tensor:
        corrupted[:, index[1]] = 2 * clean[:, index[1]]
        return corrupted

    arguments = (prompts(1, seed=2), cache, logit_difference, own_setter, "mlp_out", ("layer", "pos"))
    with torch.no_grad():
        expected = patching.generic_activation_patch(bridge, *arguments)
    with pytest.warns(UserWarning, match="own_setter.*one forward a cell"):
        found = backend.generic_activation_patch(bridge, *arguments)
    assert torch.equal(found, expected)


def test_hooks_of_the_user_stay_in_place(bridge_of: Any) -> None:
    bridge = bridge_of("gpt2")
    block = bridge.original_model.transformer.h[1]
    handle = block.register_forward_hook(lambda *_: None)
    modules = {name: type(module) for name, module in bridge.original_model.named_modules()}
    _, cache = bridge.run_with_cache(prompts(1, seed=1))
    arguments = (prompts(1, seed=2), cache, logit_difference, patching.layer_pos_patch_setter, "z", ("layer", "pos"))
    backend.generic_activation_patch(bridge, *arguments)
    assert handle.id in block._forward_hooks
    assert {name: type(module) for name, module in bridge.original_model.named_modules()} == modules
    handle.remove()


def test_one_clean_prompt_serves_all_corrupted_ones_and_other_numbers_are_refused(bridge_of: Any) -> None:
    bridge = bridge_of("gpt2")
    caches = {count: bridge.run_with_cache(prompts(count, seed=1))[1] for count in (1, 2)}

    def sweep(library: Any, cache: Any) -> torch.Tensor:
        setter = patching.layer_pos_patch_setter
        with torch.no_grad():
            return library.generic_activation_patch(
                bridge, prompts(3, seed=2), cache, logit_difference, setter, "resid_post", ("layer", "pos")
            )

    torch.testing.assert_close(sweep(backend, caches[1]), sweep(patching, caches[1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(BackendError, match="of 2 prompts: expected 1, or 3"):
        sweep(backend, caches[2])


def test_a_model_that_is_no_bridge_is_refused() -> None:
    with pytest.raises(BackendError, match="boot_transformers"):
        backend.TransformerLensBackend(language_model("gpt2"))
