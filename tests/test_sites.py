"""Sites on the true architectures (built on torch's meta device) and on tiny pipelines."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fasttrace as ft
from fasttrace import sites
from fasttrace.errors import ModelError, SiteError
from tests.pipelines import tiny_pipeline

UNET_COUNTS = {
    "sd15": {"resnet": 22, "self_attn": 16, "cross_attn": 16, "mlp": 16},
    "sd21": {"resnet": 22, "self_attn": 16, "cross_attn": 16, "mlp": 16},
    "sdxl": {"resnet": 17, "self_attn": 70, "cross_attn": 70, "mlp": 70},
}
TEXT_LAYERS = {"sd15": (12,), "sd21": (23,), "sdxl": (12, 32)}
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


@pytest.fixture(scope="module", params=list(UNET_COUNTS))
def true_shape(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, ft.zoo.random_pipeline(request.param, device="meta")


def test_true_architectures_have_the_known_sites_and_parameters(true_shape: tuple[str, Any]) -> None:
    name, pipe = true_shape
    sites = ft.discover_sites(pipe)
    assert Counter(s.kind for s in sites if s.part == "unet") == UNET_COUNTS[name]
    assert sum(p.numel() for p in pipe.unet.parameters()) == PARAMETERS[name]
    for part, layers in zip(("text_encoder", "text_encoder_2"), TEXT_LAYERS[name], strict=False):
        mine = [s for s in sites if s.part == part]
        assert [s.kind for s in mine] == ["self_attn", "mlp", "hidden"] * layers
        assert [s.layer for s in mine] == [layer for layer in range(layers) for _ in range(3)]


def test_names_are_unique_and_free_of_version_dependent_paths(true_shape: tuple[str, Any]) -> None:
    _, pipe = true_shape
    names = [s.name for s in ft.discover_sites(pipe)]
    assert len(set(names)) == len(names)
    assert not any("text_model" in name for name in names)
    assert "text_encoder.encoder.layers.0.self_attn" in names
    assert "unet.mid_block.resnets.0" in names


def test_sites_are_listed_in_the_order_in_which_the_forward_runs_them(tiny: Any) -> None:
    sites = [s for s in ft.discover_sites(tiny) if s.part == "unet"]
    ran: list[str] = []
    handles = [s.module.register_forward_hook(lambda *_, name=s.name: ran.append(name)) for s in sites]
    try:
        tiny("a red apple", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [s.name for s in sites]


def test_layers_count_within_a_kind(tiny: Any) -> None:
    sites = [s for s in ft.discover_sites(tiny) if s.part == "unet"]
    for kind in {s.kind for s in sites}:
        layers = [s.layer for s in sites if s.kind == kind]
        assert layers == list(range(len(layers)))


def test_selection_by_part_glob_and_name(tiny_sd15: Any) -> None:
    sites = ft.discover_sites(tiny_sd15)
    assert {s.part for s in ft.select_sites(sites, "unet")} == {"unet"}
    assert {s.part for s in ft.select_sites(sites, "text")} == {"text_encoder"}
    attn1 = ft.select_sites(sites, ["unet.*.attn1", "unet.mid_block.resnets.0"])
    assert {s.kind for s in attn1} == {"self_attn", "resnet"}
    assert attn1 == [s for s in sites if s in attn1]


@pytest.mark.parametrize("wrong", ["unet.mid_block.resnet.0", "text_encoder.encoder.layers.0.self_atn"])
def test_an_unknown_site_is_refused_with_the_nearest_names(tiny_sd15: Any, wrong: str) -> None:
    nearest = "unet.mid_block.resnets.0" if wrong.startswith("unet") else "text_encoder.encoder.layers.0.self_attn"
    with pytest.raises(SiteError, match=nearest):
        ft.find_site(tiny_sd15, wrong)
    with pytest.raises(SiteError, match=nearest):
        ft.select_sites(ft.discover_sites(tiny_sd15), wrong)


def test_whole_blocks_are_found_by_name_only(tiny_sd15: Any) -> None:
    block = ft.find_site(tiny_sd15, "unet.down_blocks.0.attentions.0")
    inner = ft.find_site(tiny_sd15, "unet.down_blocks.0.attentions.0.transformer_blocks.0")
    assert (block.kind, inner.kind) == ("hidden", "hidden")
    assert block not in ft.discover_sites(tiny_sd15)


def test_heads_are_found_by_name_only(tiny_sd15: Any) -> None:
    name = "text_encoder.encoder.layers.1.self_attn.heads.1"
    head = ft.find_site(tiny_sd15, name)
    assert (head.name, head.kind, head.layer) == (name, "head", 1)
    encoder = tiny_sd15.text_encoder
    assert head.module is encoder.get_submodule("encoder.layers.1.self_attn.out_proj")
    width = encoder.config.hidden_size // encoder.config.num_attention_heads
    assert head.channels == slice(width, 2 * width)
    assert name not in {site.name for site in ft.discover_sites(tiny_sd15)}
    with pytest.raises(SiteError, match="heads"):
        ft.find_site(tiny_sd15, name.replace("heads.1", "heads.999"))


def test_the_older_layout_of_clip_gives_the_same_names(tiny_sdxl: Any) -> None:
    """Encoders with a projection keep ``text_model.`` in their paths, as all of CLIP did before transformers 5.6."""
    encoder = tiny_sdxl.text_encoder_2
    assert any(name.startswith("text_model.") for name, _ in encoder.named_modules())
    names = [s.name for s in ft.discover_sites(SimpleNamespace(text_encoder=encoder))]
    assert names == [s.name for s in ft.discover_sites(tiny_sdxl) if s.part == "text_encoder"]


def test_a_pipeline_without_known_modules_is_refused() -> None:
    with pytest.raises(ModelError, match="UNet2DConditionModel"):
        ft.discover_sites(SimpleNamespace(unet=torch.nn.Linear(2, 2)))


def test_several_sites_are_found_in_one_look(tiny_sd15: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "unet.mid_block.resnets.0",
        "unet.mid_block.attentions.0",
        "text_encoder.encoder.layers.1.self_attn.heads.1",
    ]
    expected = {name: ft.find_site(tiny_sd15, name) for name in names}
    looks = []
    discover = sites.discover_sites
    monkeypatch.setattr(sites, "discover_sites", lambda pipe: looks.append(1) or discover(pipe))
    assert sites.find_sites(tiny_sd15, names * 2) == expected
    assert len(looks) == 1
    with pytest.raises(SiteError, match=names[0]):
        sites.find_sites(tiny_sd15, [names[1], "unet.mid_block.resnet.0"])


TRANSFORMER_COUNTS = {
    "sd3": {"joint_attn": 47, "mlp": 47},
    "sd35-medium": {"joint_attn": 47, "self_attn": 13, "mlp": 47},
    "sd35-large": {"joint_attn": 75, "mlp": 75},
    "flux": {"joint_attn": 76, "mlp": 76},
    "pixart-sigma": {"self_attn": 28, "cross_attn": 28, "mlp": 28},
}


@pytest.mark.parametrize("name", TRANSFORMER_COUNTS)
def test_transformers_have_the_known_sites(name: str) -> None:
    pipe = ft.zoo.random_pipeline(name, device="meta")
    sites = ft.discover_sites(pipe)
    mine = ft.select_sites(sites, "transformer")
    assert Counter(site.kind for site in mine) == TRANSFORMER_COUNTS[name]
    assert mine == ft.select_sites(sites, "denoiser")
    assert {site.part for site in ft.select_sites(sites, "text")} == {site.part for site in sites} - {"transformer"}
    for kind in TRANSFORMER_COUNTS[name]:
        layers = [site.layer for site in mine if site.kind == kind]
        assert layers == list(range(len(layers)))


def test_streams_blocks_modulations_and_heads_of_transformers_by_name() -> None:
    pipe = tiny_pipeline("tiny-flux")
    block = pipe.transformer.transformer_blocks[1]
    found = {
        "transformer.transformer_blocks.1.attn.image": ("joint_attn", "image", 0, block.attn),
        "transformer.transformer_blocks.1.attn.text": ("joint_attn", "text", 1, block.attn),
        "transformer.transformer_blocks.1.image": ("hidden", "image", 1, block),
        "transformer.transformer_blocks.1.text": ("hidden", "text", 0, block),
        "transformer.transformer_blocks.1.norm1.modulation": ("modulation", "", 0, block.norm1.linear),
        "transformer.transformer_blocks.1.attn.text.heads.1": ("head", "text", 0, block.attn.to_add_out),
    }
    listed = {site.name for site in ft.discover_sites(pipe)}
    for name, (kind, stream, output, module) in found.items():
        site = ft.find_site(pipe, name)
        assert (site.name, site.kind, site.stream, site.output) == (name, kind, stream, output)
        assert site.module is module
        assert (name in listed) == (kind == "joint_attn")
    head = ft.find_site(pipe, "transformer.transformer_blocks.1.attn.text.heads.1")
    assert head.channels == slice(16, 32)
    assert head.layer == ft.find_site(pipe, "transformer.transformer_blocks.1.attn.text").layer
    with pytest.raises(SiteError, match=r"nearest: .*attn\.text"):
        ft.find_site(pipe, "transformer.transformer_blocks.1.attn.text.heads.2")


def test_a_transformer_of_an_unknown_class_has_no_sites() -> None:
    encoder = tiny_pipeline("tiny-sd3").text_encoder
    pipe = SimpleNamespace(text_encoder=encoder, transformer=torch.nn.Linear(2, 2))
    assert {site.part for site in ft.discover_sites(pipe)} == {"text_encoder"}
