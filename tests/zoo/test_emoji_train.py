"""The training code runs, stops and resumes, stage by stage, on a few scenes in a temporary folder."""

from __future__ import annotations

import csv
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttrace.errors import ModelError
from fasttrace.zoo.emoji import architecture, data, judge, model, train_scorer, train_unet, train_vae
from fasttrace.zoo.emoji.muon import Muon, orthogonalise
from fasttrace.zoo.emoji.tokenizer import build_tokenizer
from fasttrace.zoo.emoji.train import Workshop
from fasttrace.zoo.emoji.training import Loop


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = data.training_scenes()[:: len(data.training_scenes()) // 12]
    for module in (train_vae, train_scorer, train_unet):
        monkeypatch.setattr(module, "training_scenes", lambda: scenes)


def a_loop(folder: Path, minutes: float = 1.0, **options: Any) -> tuple[Loop, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    return Loop("line", module, Muon(module.parameters(), lr=0.05), folder, minutes, **options), module


def fit(loop: Loop, module: nn.Module, steps: int) -> None:
    for _ in itertools.islice(loop, steps):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(loop.step))
        loop.backward((module(x) - x.sum(1, keepdim=True)).square().mean())


def test_a_resumed_stage_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    first, _ = a_loop(tmp_path / "parts", max_steps=3)
    first.rate = lambda: 1.0  # type: ignore[method-assign]
    whole, module = a_loop(tmp_path / "whole", max_steps=6)
    whole.rate = lambda: 1.0  # type: ignore[method-assign]
    fit(whole, module, 6)
    fit(first, first.module, 6)
    second, _ = a_loop(tmp_path / "parts", resume=True, max_steps=6)
    second.rate = lambda: 1.0  # type: ignore[method-assign]
    assert second.step == 3
    fit(second, second.module, 6)
    assert second.step == 6
    for a, b in zip(module.state_dict().values(), second.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    for name, value in whole.average.items():
        torch.testing.assert_close(value, second.average[name])


def test_the_optimiser_learns_and_the_log_tells_it(tmp_path: Path) -> None:
    loop, module = a_loop(tmp_path, max_steps=300)
    fit(loop, module, 301)
    x = torch.randn(64, 4)
    loop.load_average()
    assert (module(x) - x.sum(1, keepdim=True)).square().mean() < 0.5
    with (tmp_path / "line.csv").open() as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == 300


def test_sigterm_ends_a_stage_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    loop, module = a_loop(tmp_path)
    for step in loop:
        loop.backward(module(torch.ones(1, 4)).sum())
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    assert a_loop(tmp_path, resume=True)[0].step == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_learning_rate_rises_stays_and_falls_to_zero(tmp_path: Path) -> None:
    loop, _ = a_loop(tmp_path)
    rates = []
    for share in (0.0, 0.02, 0.6, 0.9, 1.0):
        loop.elapsed = share * loop.seconds
        rates.append(loop.rate())
    assert 0 < rates[0] < rates[1] == rates[2] == 1 > rates[3] > rates[4] == 0


@pytest.mark.parametrize("shape", [(7, 31), (31, 7), (16, 16)])
def test_orthogonalised_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.parametrize("fresh", [False, True])
def test_stages_go_on_from_the_committed_weights_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    shop, starts = Workshop(tmp_path, model.WEIGHTS, fresh=fresh), {}
    made = {"vae": shop.committed.vae, "scorer": architecture.clip(700, 1, 2), "unet": shop.committed.unet}
    for name, module in (("vae", train_vae), ("scorer", train_scorer), ("unet", train_unet)):

        def train(*args: Any, start: Any = None, name: str = name, **options: Any) -> Any:
            starts[name] = start
            return made[name]

        monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(train_unet, "build_cache", lambda *args: None)
    for name in ("unet", "vae", "scorer"):
        shop.run(name, 1)
        assert (starts[name] is None) == fresh
    if not fresh:
        committed, given = (clip.text_model.state_dict() for clip in (model.load_scorer("cpu").clip, starts["scorer"]))
        assert all(torch.equal(value, committed[key]) for key, value in given.items())


def test_a_text_encoder_of_other_captions_is_refused(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, model.WEIGHTS)
    shop.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ModelError, match=r"knows 722 tokens and the captions have 723.*--fresh"):
        shop.run("scorer", 1)


def test_pictures_of_a_batch_are_shifted_apart() -> None:
    dots = torch.zeros(40, 3, 16, 16)
    dots[:, :, 8, 8] = 9.0
    places = {int(image.sum(0).argmax()) for image in train_scorer.augment(dots)}
    assert len(places) > 5
    assert all(abs(place // 16 - 8) <= 2 and abs(place % 16 - 8) <= 2 for place in places)


@pytest.mark.usefixtures("few_scenes")
def test_every_stage_takes_steps_resumes_and_exports(tmp_path: Path) -> None:
    work, weights = tmp_path / "work", tmp_path / "weights"
    tokenizer = build_tokenizer(work / "tokenizer")
    stages: dict[str, Callable[..., Any]] = {
        "vae": lambda **o: train_vae.train(work, 1, batch=2, **o),
        "scorer": lambda **o: train_scorer.train(tokenizer, work, 1, bases=2, **o),
        "judge": lambda **o: judge.train(work, 1, batch=4, **o),
    }
    made = {name: stage(max_steps=2) for name, stage in stages.items()}
    for name, stage in stages.items():
        stage(resume=True, max_steps=3)
        assert '"step": 3' in (work / f"{name}.json").read_text()

    encoder = model.text_encoder_of(made["scorer"])
    cache = train_unet.build_cache(made["vae"], encoder, tokenizer)
    assert cache.latents.shape[1:] == (architecture.LATENT_CHANNELS, 8, 8)
    assert len(cache.pictures) == len(cache.captions)
    unet = train_unet.train(cache, work, 1, batch=2, max_steps=1)

    latents = made["vae"].encode(torch.zeros(1, 3, 64, 64)).latent_dist
    assert latents.std.max() < 1e-3
    decoder = train_vae.train(work / "decoder", 1, start=made["vae"], decoder_only=True, batch=2, max_steps=1)
    assert torch.equal(decoder.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean, latents.mean)

    model.export(made["scorer"], decoder, unet, tokenizer, weights)
    judge.save_judge(made["judge"], weights)
    pipe = model.load("cpu", folder=weights)
    images = pipe("a red penguin in flat style", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert torch.isfinite(images).all()
    text = ["a red penguin in flat style"]
    mine = model.Scorer(made["scorer"], tokenizer).text_features(text)
    torch.testing.assert_close(model.load_scorer("cpu", folder=weights).text_features(text), mine, atol=5e-3, rtol=0)
    shop = Workshop(tmp_path / "later", weights)
    assert shop.vae().config.scaling_factor == pytest.approx(decoder.config.scaling_factor)
