"""The units of diffusion transformers against the models: outputs, sites as forward hooks see them, operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fasttrace as ft
from fasttrace.engine.denoise.cost import cost_of
from fasttrace.models.heads import with_heads
from fasttrace.models.registry import DESCRIBE, description_of
from fasttrace.models.unit import Dims, weights_in
from tests.models.transformer_cases import TOKENS, Call

TINY = ["tiny-sd3", "tiny-sd35", "tiny-flux", "tiny-pixart"]
LISTED = {"sd3": 94, "sd35-medium": 107, "sd35-large": 150, "flux": 152, "pixart-sigma": 84}
SIZES = [(8, 8), (4, 6)]


def transformer(name: str, device: str = "cpu") -> Any:
    return ft.zoo.random_pipeline(name, dtype=torch.float64, device=device).transformer


def described(model: Any) -> Any:
    description = description_of(model)
    assert description is not None
    return description


def seen(point: Any, output: Any) -> Tensor:
    """A site's value in what a hook sees; a modulation is one position."""
    value: Tensor = output[point.output] if isinstance(output, tuple) else output
    return value.unsqueeze(1) if value.ndim == 2 else value


def hooked(description: Any, call: Call) -> list[tuple[str, Tensor]]:
    """Every site and its value in the order in which hooks fire."""
    values, handles = list[tuple[str, Tensor]](), []
    for path, point in description.sites.items():

        def fired(module: Any, args: Any, output: Any, path: str = path, point: Any = point) -> None:
            values.append((path, seen(point, output)))

        handles.append(point.module.register_forward_hook(fired))
    try:
        call.by_model()
    finally:
        for handle in handles:
            handle.remove()
    return values


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY)
def test_units_do_what_the_model_does(name: str, size: tuple[int, int]) -> None:
    call = Call(transformer(name), 3, size)
    description = described(call.model)
    assert description.runs
    torch.testing.assert_close(call.by_units(description), call.by_model(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY)
def test_sites_are_what_hooks_see_in_the_order_in_which_they_fire(name: str, size: tuple[int, int]) -> None:
    call = Call(transformer(name), 2, size)
    description = described(call.model)
    expected = hooked(description, call)
    assert [path for path, _ in expected] == list(description.sites)
    shapes = {path: point.shape(Dims(*size, TOKENS)) for path, point in description.sites.items()}
    assert {path: tuple(value.shape[1:]) for path, value in expected} == shapes
    values = list[tuple[str, Tensor]]()

    def at_site(path: str, value: Tensor) -> Tensor:
        values.append((path, value))
        return value

    call.by_units(description, at_site)
    assert [path for path, _ in values] == list(description.sites)
    for (path, value), (_, truth) in zip(values, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_at_a_site_is_what_the_model_goes_on_with(name: str) -> None:
    call = Call(transformer(name), 2, (8, 8))
    description = described(call.model)
    for path, point in description.sites.items():

        def double(module: Any, args: Any, output: Any, point: Any = point) -> Any:
            if isinstance(output, tuple):
                return (*output[: point.output], 2 * output[point.output], *output[point.output + 1 :])
            return 2 * output

        handle = point.module.register_forward_hook(double)
        expected = call.by_model()
        handle.remove()
        found = call.by_units(description, lambda site, value, path=path: 2 * value if site == path else value)
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=1e-10, msg=lambda text, path=path: f"{path}: {text}"
        )


@pytest.mark.parametrize("name", TINY)
def test_a_head_is_its_share_of_the_projections_input(name: str) -> None:
    call = Call(transformer(name), 2, (8, 8))
    plain = described(call.model)
    names = [f"{path}.heads.1" for path, point in plain.sites.items() if point.heads is not None]
    description = with_heads(plain, names)
    assert len(names) == sum("attn" in point.kind for point in plain.sites.values())
    assert list(plain.sites) == [path for path in description.sites if path not in names]
    for path in names:
        point = description.sites[path]

        def double(module: Any, args: Any, point: Any = point) -> Any:
            heads = args[0].clone()
            heads[..., point.channels] *= 2
            return (heads,)

        def at_site(site: str, value: Tensor, path: str = path, point: Any = point) -> Tensor:
            if site != path:
                return value
            assert (value.shape[1], 16) == point.shape(Dims(8, 8, TOKENS))
            value = value.clone()
            value[..., point.channels] *= 2
            return value

        handle = point.module.register_forward_pre_hook(double)
        expected = call.by_model()
        handle.remove()
        found = call.by_units(description, at_site)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(found, call.by_units(description))


def test_heads_that_are_not_there_are_no_sites() -> None:
    description = described(transformer("tiny-sd3"))
    names = ["transformer.transformer_blocks.0.attn.image.heads.2", "transformer.transformer_blocks.0.ff.heads.0", "x"]
    assert list(with_heads(description, names).sites) == list(description.sites)


@pytest.mark.parametrize("name", LISTED)
def test_listed_sites_of_the_true_shapes(name: str) -> None:
    description = described(transformer(name, "meta"))
    listed = [point for point in description.sites.values() if point.listed]
    assert len(listed) == LISTED[name]
    assert {point.kind for point in listed} <= {"joint_attn", "self_attn", "cross_attn", "mlp"}


@pytest.mark.parametrize("name", [*TINY, "flux"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """But for the text's way in and the embedding of timestep and pooled text."""
    model = transformer(name, "meta")
    description = described(model)
    call = Call(model, 2, (8, 8), "meta")
    with FlopCounterMode(display=False) as counter:
        call.by_model()
    once = [getattr(model, part, None) for part in ("context_embedder", "caption_projection")]
    crossing = [linear for one in description.crossing.values() for linear in (one.to_k, one.to_v)]
    text = weights_in(*(part for part in once if part is not None), *crossing)
    time = weights_in(model.time_text_embed if hasattr(model, "time_text_embed") else model.adaln_single.emb)
    apart = 2 * TOKENS * text + 2 * time
    counted = cost_of(description, Dims(8, 8, TOKENS)).flops + apart
    assert counter.get_total_flops() / 2 == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_a_hook_on_a_bypassed_module_or_another_processor_is_not_covered(name: str) -> None:
    model = transformer(name)
    block = model.transformer_blocks[0]
    assert described(model).runs
    handle = block.register_forward_hook(lambda *_: None)
    assert not described(model).runs
    handle.remove()
    attention = block.attn1 if hasattr(block, "attn1") else block.attn
    attention.processor = object()
    assert not described(model).runs


def test_other_classes_have_no_description() -> None:
    assert description_of(torch.nn.Linear(1, 1)) is None
    assert {"UNet2DConditionModel", "SD3Transformer2DModel"} <= DESCRIBE.keys()
