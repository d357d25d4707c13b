"""The packaged model as it is shipped: it loads offline, quietly, and is what its card says in kind and size."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import fasttrace as ft
from fasttrace.errors import ModelError
from fasttrace.zoo import emoji
from fasttrace.zoo.emoji import data, evaluate, judge, noise_check
from fasttrace.zoo.emoji.drawing import Settings
from fasttrace.zoo.emoji.model import WEIGHTS

PACKAGE = Path(emoji.__file__).parent


@pytest.fixture(scope="module")
def pipe():
    return emoji.load("cpu")


def test_the_package_is_small_and_holds_no_pickle() -> None:
    files = [path for path in (*WEIGHTS.rglob("*"), PACKAGE / "atlas.png") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()} <= {".json", ".txt", ".safetensors"}
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not any("_name_or_path" in path.read_text() for path in WEIGHTS.rglob("*.json"))


def test_it_loads_without_a_word_and_without_a_network(monkeypatch, capfd, caplog) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded = ft.load_pipeline("emoji", device="cpu")
        loaded("a red penguin in flat style", num_inference_steps=1, output_type="latent")
        emoji.load_scorer("cpu")
        emoji.load_judge("cpu")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_it_is_a_stable_diffusion_pipeline_with_sites_of_every_kind(pipe) -> None:
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.safety_checker is None
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    sites = ft.discover_sites(pipe)
    unet = [site for site in sites if site.part == "unet"]
    assert len(unet) >= 40
    assert {site.kind for site in unet} == {"resnet", "self_attn", "cross_attn", "mlp"}
    assert len([site for site in sites if site.part == "text_encoder"]) == 18
    assert pipe.tokenizer.is_fast


def test_a_picture_has_64_pixels_a_side_and_depends_on_the_seed_alone(pipe) -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            "two green robot in outline style", num_inference_steps=2, generator=generator, output_type="pt"
        ).images

    assert draw(0).shape == (1, 3, 64, 64)
    torch.testing.assert_close(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1))


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_take_its_configuration(pipe, name) -> None:
    import diffusers

    before, pipe.scheduler = pipe.scheduler, getattr(diffusers, name).from_config(pipe.scheduler.config)
    try:
        images = pipe("a red gift in flat style", num_inference_steps=4, output_type="pt").images
    finally:
        pipe.scheduler = before
    assert torch.isfinite(images).all()


def test_the_scorer_gives_unit_vectors_in_one_space_at_any_picture_size() -> None:
    scorer = emoji.load_scorer("cpu")
    images = scorer.image_features(torch.rand(2, 3, 96, 80))
    texts = scorer.text_features(["a red penguin in flat style", "zebra"])
    assert images.shape == texts.shape == (2, 128)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    with pytest.raises(ModelError, match="expected"):
        scorer.image_features(torch.rand(3, 64, 64))


def test_the_scorer_prefers_the_right_caption_more_often_than_chance() -> None:
    for name, counts in evaluate.clip_preference(emoji.load_scorer("cpu"), 60).items():
        assert evaluate.wilson(*counts)[0] > 0.5, name


def test_the_judge_reads_renderings_that_it_has_not_seen() -> None:
    trained, unseen = judge.split()
    assert not set(trained) & set(unseen)
    for name, (right, total) in judge.accuracy(emoji.load_judge("cpu"), unseen[:300]).items():
        assert right / total > 0.95, name


def test_the_judge_says_what_it_reads_in_the_captions_words() -> None:
    scene = data.held_out_scenes()[5]
    image = torch.from_numpy(data.render(scene)).permute(2, 0, 1)[None].float() / 255
    assert set(emoji.load_judge("cpu").read(image)[0]) == set(data.NAMES)
    total = sum(p.sum() for p in emoji.load_judge("cpu").probabilities(image).values())
    torch.testing.assert_close(total, torch.tensor(float(len(data.NAMES))))


def test_missing_weights_are_said_to_be_missing(tmp_path) -> None:
    for loader in (emoji.load, emoji.load_scorer, emoji.load_judge):
        with pytest.raises(ModelError, match="missing"):
            loader("cpu", folder=tmp_path)


def test_wilson_interval_holds_the_share_and_stays_within_bounds() -> None:
    assert evaluate.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert evaluate.wilson(10, 10)[1] == pytest.approx(1, abs=1e-12)
    low, high = evaluate.wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)


def test_noise_on_every_attribute_is_read_and_has_a_total_effect(pipe) -> None:
    settings = Settings(steps=1, batch=4)
    found = noise_check.measure(pipe, emoji.load_judge("cpu"), emoji.load_scorer("cpu"), 3, settings, scales=(10,))
    read = found["10x"]["read"]
    assert set(read) == {"none", "chance", *data.NAMES}
    assert all(len(shares) == 6 and 0 <= min(shares) <= max(shares) <= 1 for shares in read.values())
    for kind in ("judge", "clip_score"):
        assert set(found["10x"][kind]) == set(data.NAMES)
        assert all(low <= mean <= high for mean, low, high in found["10x"][kind].values())
        assert any(mean for mean, _, _ in found["10x"][kind].values())
    lines = noise_check.report(found)
    assert len({line.count("|") for line in lines[1:10]}) == 1


def test_pictures_are_counted_under_every_pair_that_they_are_held_out_for() -> None:
    scenes = data.held_out_scenes()[::40]
    images = torch.from_numpy(data.render_all(scenes, [0] * len(scenes))).permute(0, 3, 1, 2) / 255
    table = evaluate.pair_table(emoji.load_judge("cpu"), images, scenes, least=1)
    assert sum(row["pose"][1] for row in table.values()) == sum(len(data.broken_pairs(scene)) for scene in scenes)
    turned = [s for s in scenes if s.values["count"] == "two" and s.values["pose"] == "upside down"]
    assert table["two, upside down"]["pose"][1] == len(turned) > 0


def test_the_autoencoder_alone_is_judged_by_what_it_loses() -> None:
    def vae(loss: float) -> SimpleNamespace:
        return SimpleNamespace(
            encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x)),
            decode=lambda z: SimpleNamespace(sample=z * (1 - loss)),
        )

    reader = emoji.load_judge("cpu")
    exact, dim, gone = (evaluate.autoencoder_table(vae(loss), reader, 60) for loss in (0.0, 0.1, 1.0))
    for style in data.ATTRIBUTES["style"]:
        assert exact["psnr"][style] == float("inf") > dim["psnr"][style] > gone["psnr"][style] > 0
    assert exact["read"]["object"][0] > 55 > gone["read"]["object"][0]
    kept = evaluate.autoencoder_table(emoji.load("cpu").vae, reader, 60)
    assert min(kept["psnr"].values()) > 18


def test_the_report_has_every_share_with_its_interval() -> None:
    shares = {name: (80 + i, 100) for i, name in enumerate(data.NAMES)}
    found = {
        **dict.fromkeys(("held_out", "trained", "judge", "clip"), shares),
        "held_out_pairs": {"two, upside down": shares},
        "autoencoder": {"psnr": {"flat style": 28.06}, "read": shares},
    }
    lines = evaluate.report(found).splitlines()
    assert "| object | 80.0% | 71.1% to 86.7% | 85% | 80.0% | 80.0% | 80.0% | 71.1% to 86.7% |" in lines
    assert len({line.count("|") for line in lines[: 2 + len(data.NAMES)]}) == 1
    assert "| two, upside down | 100 | 80% | 81% | 82% | 83% | 84% | 85% |" in lines
    assert "28.1 dB in flat style" in lines[-1]


def test_a_changed_value_changes_one_attribute_and_never_to_no_colour() -> None:
    import random

    rng = random.Random(0)
    for scene in data.held_out_scenes()[::500]:
        for name in data.NAMES:
            other = evaluate.other_value(scene, name, rng)
            assert [a for a in data.NAMES if getattr(scene, a) != getattr(other, a)] == [name]
            assert other.values["colour"] != data.NO_COLOUR or name != "colour"


def test_a_contact_sheet_is_written(tmp_path) -> None:
    evaluate.contact_sheet(torch.rand(7, 3, 64, 64), ["a caption"] * 7, tmp_path / "sheet.png", columns=3)
    from PIL import Image

    assert Image.open(tmp_path / "sheet.png").size == (3 * 152, 3 * (128 + 55))
