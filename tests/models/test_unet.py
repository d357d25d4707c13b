"""The UNet's units against the UNet: sites are what forward hooks see, in their order; operations what torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fasttrace as ft
from fasttrace.engine.denoise.cost import cost_of
from fasttrace.engine.values import first
from fasttrace.models.liveness import liveness
from fasttrace.models.unet import describe_unet
from fasttrace.models.unit import Dims, Unit, weights_in

TINY = ["tiny-sd15", "tiny-sd21", "tiny-sdxl"]


def call(unet: Any, size: tuple[int, int], device: str = "cpu") -> None:
    """One forward of two rows."""
    config = unet.config
    with torch.device(device), torch.no_grad():
        added = None
        if config.addition_embed_type:
            time_ids = torch.zeros(2, 6)
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(2, pooled), "time_ids": time_ids}
        text = torch.zeros(2, 5, config.cross_attention_dim)
        unet(torch.zeros(2, 4, *size), torch.zeros(2), text, added_cond_kwargs=added, return_dict=False)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("name", TINY)
def test_sites_are_what_hooks_see_in_the_order_in_which_they_fire(name: str, size: tuple[int, int]) -> None:
    unet = ft.zoo.random_pipeline(name).unet
    sites, seen = describe_unet(unet).sites, []
    handles = []
    for path, point in sites.items():

        def fired(module: Any, args: Any, output: Any, path: str = path) -> None:
            seen.append((path, tuple(first(output).shape[1:])))

        handles.append(point.module.register_forward_hook(fired))
    try:
        call(unet, size)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [(path, point.shape(Dims(*size, 5))) for path, point in sites.items()]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    """But for the time embedding, its share in every resnet, and the text's keys and values."""
    unet = ft.zoo.random_pipeline(name, device="meta").unet
    model = describe_unet(unet)
    with FlopCounterMode(display=False) as counter:
        call(unet, (16, 16), "meta")
    embeddings = [unet.time_embedding, *([unet.add_embedding] if unet.config.addition_embed_type else [])]
    time = weights_in(
        *embeddings, *(module.time_emb_proj for module in unet.modules() if hasattr(module, "time_emb_proj"))
    )
    text = sum(weights_in(one.to_k, one.to_v) for one in model.crossing.values())
    apart = 2 * time + 2 * 5 * text
    assert counter.get_total_flops() / 2 == pytest.approx(cost_of(model, Dims(16, 16, 5)).flops + apart, rel=1e-9)


def test_what_lives_on_past_a_unit_is_what_later_ones_read() -> None:
    def unit(reads: str, writes: str) -> Unit:
        return Unit(tuple(reads.split()), tuple(writes.split()), lambda *_: ())

    units = [unit("in", "x"), unit("x", "skip"), unit("x", "branch"), unit("x branch", "x"), unit("x skip", "x")]
    flow = liveness(units, ("in",), ("x",))
    assert flow.live_on == [
        {("x", 0)},
        {("x", 0), ("skip", 1)},
        {("x", 0), ("skip", 1), ("branch", 2)},
        {("x", 3), ("skip", 1)},
        {("x", 4)},
    ]
    assert flow.live == [{("in", -1)}, *flow.live_on[:3], {("x", 3), ("skip", 1)}]
    assert flow.last == [(("in", -1),), (), (), (("branch", 2), ("x", 0)), (("skip", 1), ("x", 3))]
    assert flow.outputs == (("x", 4),)


def test_a_value_that_nobody_reads_is_dropped_at_once() -> None:
    units = [Unit(("x",), ("x", "unread"), lambda *_: ())]
    assert liveness(units, ("x",), ("x",)).last == [(("unread", 0), ("x", -1))]
