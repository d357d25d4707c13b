"""The description of every text family against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fasttrace.models.description import Description
from fasttrace.models.text.families import is_causal, text_body, text_model
from fasttrace.models.text.units import INPUTS, OUTPUTS, run_units, text_forward, text_units
from tests.engine import text_models
from tests.engine.text_models import ALL, EOS, LENGTH, T5, VOCABULARY

IDS = torch.randint(0, VOCABULARY - 3, (2, LENGTH), generator=torch.Generator().manual_seed(0))
IDS[0, 5], IDS[1, -1] = EOS, EOS
MASKS = [None, torch.tensor([[1] * 7 + [0, 0], [1] * LENGTH])]


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return text_models.text_model(request.param)


@pytest.mark.parametrize("mask", MASKS)
def test_units_one_after_another_give_the_models_own_states(model: Any, mask: Tensor | None) -> None:
    described = text_model(model)
    values = run_units(text_units(described), text_forward(described, LENGTH, mask), ids=IDS)
    with torch.no_grad():
        expected = text_body(model)(input_ids=IDS, attention_mask=mask).last_hidden_state
    read = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(values["states"][read], expected[read], rtol=1e-10, atol=1e-10)


def test_sites_fire_in_the_order_and_shape_that_units_declare(model: Any) -> None:
    described = text_model(model)
    points = [point for unit in text_units(described) for point in unit.sites]
    seen: list[tuple[str, tuple[int, ...]]] = []
    handles = []
    for point in points:

        def before(module: Any, args: Any, point: Any = point) -> None:
            seen.append((point.path, tuple(args[0][..., point.channels].shape[1:])))

        def after(module: Any, args: Any, output: Any, point: Any = point) -> None:
            value = output if isinstance(output, Tensor) else output[point.output]
            seen.append((point.path, tuple(value.shape[1:])))

        head = point.channels is not None
        handles.append(
            point.module.register_forward_pre_hook(before) if head else point.module.register_forward_hook(after)
        )
    try:
        text_body(model)(input_ids=IDS)
    finally:
        for handle in handles:
            handle.remove()
    dims = text_forward(described, LENGTH).dims
    assert seen == [(point.path, point.shape(dims)) for point in points]
    layers, heads = len(described.layers), described.layers[0].heads
    assert [point.layer for point in points] == [layer for layer in range(layers) for _ in range(heads + 3)]
    assert [point.kind for point in points if point.listed] == ["self_attn", "mlp", "hidden"] * layers


def test_a_sites_value_is_what_its_unit_writes(model: Any) -> None:
    described = text_model(model)
    forward = text_forward(described, LENGTH)
    forward.rows = len(IDS)
    values, seen = {"ids": IDS}, {}
    units = text_units(described)
    listed = [point for unit in units for point in unit.sites if point.listed]
    handles = [
        point.module.register_forward_hook(
            lambda module, args, output, path=point.path: seen.update(
                {path: output if isinstance(output, Tensor) else output[0]}
            )
        )
        for point in listed
    ]
    try:
        text_body(model)(input_ids=IDS)
    finally:
        for handle in handles:
            handle.remove()
    for unit in units:
        values |= {unit.writes[0]: unit.run(forward, *(values[name] for name in unit.reads))}
        for point in unit.sites:
            if point.listed:
                torch.testing.assert_close(values[point.value], seen[point.path], rtol=1e-10, atol=1e-10)


def test_flops_are_those_that_torch_counts(model: Any) -> None:
    """Products of matrices: all projections, and attention without regard to what is masked."""
    described = text_model(model)
    forward, values = text_forward(described, LENGTH), {"ids": IDS[:1]}
    for unit in text_units(described):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            values[unit.writes[0]] = unit.run(forward, *(values[name] for name in unit.reads))
        assert counter.get_total_flops() == unit.flops(forward.dims)


def test_what_is_live_at_each_site(model: Any) -> None:
    """A run that joins at a site brings the hidden state, and the site's value where that is not the hidden state."""
    described = Description("model", text_units(text_model(model)), INPUTS, OUTPUTS, runs=True)
    for name, point in described.sites.items():
        brought = {value for value, _ in described.brought[name]}
        assert brought == ({"x"} if point.kind == "hidden" else {"x", point.value})


def test_a_batch_of_one_fans_out_at_every_projection_behind_the_attention(model: Any) -> None:
    added = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for layer in text_model(model).layers:
        for weight in layer.weights:
            if weight.before_attention:
                continue
            handle = weight.module.register_forward_hook(lambda module, args, output: output + added)
            try:
                one, three = (text_body(model)(input_ids=IDS[:1].repeat(n, 1)).last_hidden_state for n in (1, 3))
            finally:
                handle.remove()
            torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-10)


def test_who_reads_whom() -> None:
    for name in ALL:
        model = text_models.text_model(name)
        changed = IDS[:1].clone()
        changed[0, -1] = (changed[0, -1] + 1) % (VOCABULARY - 3)
        before, after = (text_body(model)(input_ids=ids).last_hidden_state[0, :-1] for ids in (IDS[:1], changed))
        unmoved = bool(torch.allclose(before, after, rtol=1e-9, atol=1e-9))
        assert is_causal(model) == text_model(model).family.causal == unmoved == (name not in T5)


def test_an_unknown_model_is_not_taken_for_causal() -> None:
    assert not is_causal(torch.nn.Linear(2, 2))
