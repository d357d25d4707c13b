"""Hooks, replacements and dropout that the packed engine would leave out are refused, unless they change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fasttrace as ft
from fasttrace.engine.text.trace import run_text_request, text_request, trace_logits, trace_text_parts
from fasttrace.errors import ModelError
from fasttrace.sites import part_sites
from tests.engine.text_models import ALL, LENGTH, text_model

IDS = torch.arange(LENGTH) + 1
NOISE = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def larger(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def own_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: larger(module, args, before(*args, **kwargs))  # type: ignore[method-assign]


def trace(model: Any, engine: str = "fast") -> ft.TextTrace:
    patches = [ft.Patch(site, [3]) for site in part_sites(model, "text_encoder")]
    return ft.trace_text(model, IDS, patches, NOISE, engine=engine)


@pytest.mark.parametrize("kind", ["hidden", "self_attn"])
@pytest.mark.parametrize("change", [own_forward, lambda module: module.register_forward_hook(larger)])
@pytest.mark.parametrize("name", ALL)
def test_a_change_to_a_module_that_is_not_called_is_refused(
    name: str, change: Callable[[nn.Module], object], kind: str
) -> None:
    model = copy.deepcopy(text_model(name))
    site = next(site for site in part_sites(model, "text_encoder") if site.kind == kind and site.layer == 1)
    change(site.module)
    path = site.name.removeprefix("text_encoder.")
    with pytest.raises(ModelError, match=rf'forward on \S*{path} changes .* engine="oracle"'):
        trace(model)
    trace(model, "oracle")


def test_a_pre_hook_and_a_hook_on_the_whole_model_are_refused() -> None:
    model = copy.deepcopy(text_model("clip"))
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ModelError, match=r"on encoder\.layers\.0 changes"):
        trace(model)
    handle.remove()

    def scaled(module: nn.Module, args: Any, output: Any) -> None:
        output["last_hidden_state"] = 2 * output.last_hidden_state

    model.register_forward_hook(scaled)
    model.encoder.layers[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="on CLIPTextModel and 1 more modules changes"):
        trace(model)


def test_hooks_for_all_modules_are_refused_where_they_change_something() -> None:
    model = text_model("clip")

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        return larger(module, args, output) if type(module).__name__ == "CLIPAttention" else None

    handle = nn.modules.module.register_module_forward_hook(change)
    try:
        with pytest.raises(ModelError, match="changes what the model returns"):
            trace(model)
    finally:
        handle.remove()


def test_a_layer_of_another_class_around_the_first_is_refused() -> None:
    class Louder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return larger(self, args, self.inner(*args, **kwargs))

    model = copy.deepcopy(text_model("clip"))
    model.encoder.layers[1] = Louder(model.encoder.layers[1])
    with pytest.raises(ModelError, match=r"on encoder\.layers\.1 changes"):
        trace(model)


@pytest.mark.parametrize("output", ["last", "penultimate", "pooled"])
def test_hooks_that_only_watch_are_served(output: str) -> None:
    model, seen = copy.deepcopy(text_model("clip")), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    own_forward_that_changes_nothing = model.encoder.layers[1].self_attn.forward
    model.encoder.layers[1].self_attn.forward = lambda *args, **kwargs: own_forward_that_changes_nothing(
        *args, **kwargs
    )
    patches = [ft.Patch(site, [3]) for site in part_sites(model, "text_encoder")]
    mask = [1] * 7 + [0, 0]
    found, truth = (
        ft.trace_text(one, IDS, patches, NOISE, output=output, attention_mask=mask, engine=engine)
        for one, engine in ((model, "fast"), (text_model("clip"), "oracle"))
    )
    torch.testing.assert_close(found.restored, truth.restored, rtol=1e-9, atol=1e-9)


def test_logits_and_pooled_states_that_a_hook_changes_are_refused() -> None:
    model = copy.deepcopy(text_model("gpt2"))

    def shifted(module: nn.Module, args: Any, output: Any) -> None:
        output["logits"] = output.logits + 1

    model.register_forward_hook(shifted)
    with pytest.raises(ModelError, match="on GPT2LMHeadModel changes"):
        trace_logits(model, IDS, [], NOISE, [4, 5])
    trace(model)  # states do not pass through the head

    clip = copy.deepcopy(text_model("clip-projection"))

    def turned(module: nn.Module, args: Any, output: Any) -> None:
        output["text_embeds"] = -output.text_embeds

    clip.register_forward_hook(turned)
    with pytest.raises(ModelError, match="on CLIPTextModelWithProjection changes"):
        ft.trace_text(clip, IDS, [], NOISE, output="pooled")


def test_parts_are_refused_as_traces_are() -> None:
    model = copy.deepcopy(text_model("t5"))
    own_forward(model.encoder.block[1].layer[0])
    request = text_request(model, IDS, [], NOISE)
    for run in (run_text_request, lambda request: list(trace_text_parts(request))):
        with pytest.raises(ModelError, match=r"on encoder\.block\.1\.layer\.0 changes"):
            run(request)


@pytest.mark.parametrize("engine", ["fast", "oracle"])
@pytest.mark.parametrize(
    ("name", "path"),
    [("t5", "encoder.block.1.layer.0"), ("clip", "encoder.layers.1.self_attn"), ("llama", "model.layers.2.self_attn")],
)
def test_dropout_that_is_active_inside_is_refused(name: str, path: str, engine: str) -> None:
    model = copy.deepcopy(text_model(name))
    part = model.get_submodule(path)
    part.train()
    for module in part.modules():
        for rate in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.1)
    with pytest.raises(ModelError, match=rf"{path}\S* is in training mode: call \.eval\(\)"):
        trace(model, engine)


def test_training_mode_without_dropout_is_served() -> None:
    model = copy.deepcopy(text_model("clip")).train()
    trace(model)


def test_what_transformers_leaves_on_layers_is_its_own() -> None:
    """With a hook of the user's on a module that is not called, the model is run once to compare; else it is not."""
    model, layers = copy.deepcopy(text_model("clip")), 3
    calls: list[int] = []
    for layer in range(layers):
        model.encoder.layers[layer].layer_norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    trace(model)
    alone = len(calls)
    model(input_ids=IDS[None], output_hidden_states=True)
    before = {name: tuple(module._forward_hooks) for name, module in model.named_modules()}
    calls.clear()
    trace(model)
    assert len(calls) == alone
    assert {name: tuple(module._forward_hooks) for name, module in model.named_modules()} == before
    model.encoder.layers[0].register_forward_hook(lambda *_: None)
    calls.clear()
    trace(model)
    assert len(calls) == alone + 2 * layers
