"""Loading, encoding and decoding: what the user's own pipeline would do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fasttrace as ft
from fasttrace import pipeline
from fasttrace.errors import ModelError
from tests.pipelines import tiny_pipeline


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_a_saved_folder_loads_and_gives_the_same_latents(tiny_sd15: Any, tmp_path: Path) -> None:
    tiny_sd15.save_pretrained(tmp_path, safe_serialization=True)
    loaded = ft.load_pipeline(str(tmp_path))
    assert loaded.unet.dtype == torch.float32
    options = {"num_inference_steps": 2, "output_type": "latent"}
    ours = loaded("a red apple", generator=generator(), **options).images
    assert torch.equal(ours, tiny_sd15("a red apple", generator=generator(), **options).images)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "random:sd9"])
def test_a_model_that_is_not_there_is_refused_with_what_was_expected(name: str) -> None:
    with pytest.raises(ModelError, match=r"expected|no folder"):
        ft.load_pipeline(name)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        ft.load_pipeline(str(tmp_path))


def test_random_pipelines_repeat_by_seed_and_differ_by_seed() -> None:
    first, again = ft.zoo.random_pipeline("tiny-sd15", 1), ft.load_pipeline("random:tiny-sd15")
    same = ft.zoo.random_pipeline("tiny-sd15", 1)
    weights = [p.unet.conv_in.weight for p in (first, same, again)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_text_matters_and_rounding_does_not_in_a_random_pipeline(tiny: Any) -> None:
    """Why their weights are scaled: the text must steer a trajectory, and rounding must not."""
    options = {"num_inference_steps": 10, "output_type": "latent"}
    start = torch.randn(1, 4, 8, 8, generator=generator())
    red, blue, nudged = (
        tiny(text, latents=latents, **options).images
        for text, latents in [("a red apple", start), ("a blue dog", start), ("a red apple", start * (1 + 1e-5))]
    )
    assert (red - blue).norm() / red.norm() > 0.05
    assert (red - nudged).norm() / red.norm() < 1e-3


def test_conditions_are_the_pipelines_own(tiny: Any) -> None:
    condition, negative = pipeline.encode_prompt(tiny, "a red apple"), pipeline.encode_negative(tiny)
    if not pipeline.needs_added(tiny):
        own = tiny.encode_prompt("a red apple", tiny.unet.device, 1, True)
        assert torch.equal(condition.embeds, own[0][0])
        assert torch.equal(negative.embeds, own[1][0])
        return
    own = tiny.encode_prompt("a red apple", device=tiny.unet.device, num_images_per_prompt=1)
    assert [torch.equal(a, b[0]) for a, b in zip((condition.embeds, negative.embeds), own[:2], strict=True)] == [
        True
    ] * 2
    assert [torch.equal(a, b[0]) for a, b in zip((condition.pooled, negative.pooled), own[2:], strict=True)] == [
        True
    ] * 2


def test_decoding_gives_the_pipelines_own_pictures(tiny_sd15: Any) -> None:
    options = {"num_inference_steps": 2}
    own = tiny_sd15("a red apple", generator=generator(), output_type="np", **options).images[0]
    latents = tiny_sd15("a red apple", generator=generator(), output_type="latent", **options).images
    ours = pipeline.decode_latents(tiny_sd15, latents.repeat(3, 1, 1, 1), batch=2)
    assert ours.shape == (3, 3, 64, 64)
    for picture in ours:
        np.testing.assert_allclose(picture.permute(1, 2, 0).numpy(), own, atol=1e-5)


def test_half_precision_vaes_that_overflow_are_upcast_and_put_back() -> None:
    vae = nn.Linear(2, 2, dtype=torch.float16)
    vae.config = SimpleNamespace(force_upcast=True)
    pipe = SimpleNamespace(vae=vae)

    def interrupted() -> None:
        with pipeline.upcast_vae(pipe):
            assert vae.weight.dtype == torch.float32
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert vae.weight.dtype == torch.float16


def test_unets_that_take_more_than_latents_are_refused(tiny_sd15: Any) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(tiny_sd15.unet.config) | {"in_channels": 9}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    with pytest.raises(ModelError, match="inpainting"):
        pipeline.check_traceable(SimpleNamespace(unet=unet, vae=tiny_sd15.vae))
    with pytest.raises(ModelError, match="UNet2DConditionModel"):
        pipeline.check_traceable(SimpleNamespace(transformer=unet))


def test_offloaded_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("tiny-sd15")
    monkeypatch.setattr(pipe.unet, "_hf_hook", object(), raising=False)
    with pytest.raises(ModelError, match="remove_all_hooks"):
        pipeline.check_traceable(pipe)
