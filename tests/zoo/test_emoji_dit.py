"""The packaged transformer: its architecture, its training, its pipeline and the weights as they are shipped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from fasttrace.errors import ModelError
from fasttrace.zoo import emoji, emoji_dit
from fasttrace.zoo.emoji import data, noise_check, train_unet
from fasttrace.zoo.emoji.drawing import Settings, choose, labels_of, text_states
from fasttrace.zoo.emoji_dit import architecture, evaluate, model, train, train_transformer


@pytest.fixture(scope="module")
def base():
    return emoji.load("cpu")


@pytest.fixture
def material(base, monkeypatch):
    scenes = data.training_scenes()[:: len(data.training_scenes()) // 6]
    monkeypatch.setattr(train_unet, "training_scenes", lambda: scenes)
    return train_transformer.build_material(base.vae, base.text_encoder, base.tokenizer)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = architecture.transformer()
    for linear in (transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.normal_(linear.weight, std=0.1)
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
        torch.nn.init.normal_(block.norm1_context.linear.weight, std=0.1)
    return model.assemble(transformer.eval())


def test_it_is_an_sd3_transformer_of_a_stated_size() -> None:
    transformer = architecture.transformer()
    assert type(transformer).__name__ == "SD3Transformer2DModel"
    assert len(transformer.transformer_blocks) == architecture.BLOCKS >= 6
    assert sum(p.numel() for p in transformer.parameters()) == 6_342_032
    assert sum(t.numel() for t in transformer.state_dict().values()) * 2 <= 14e6


def test_a_fresh_one_predicts_nothing_of_the_right_shape() -> None:
    output = architecture.transformer()(
        hidden_states=torch.randn(2, 16, 8, 8),
        encoder_hidden_states=torch.randn(2, 24, 128),
        pooled_projections=torch.randn(2, 128),
        timestep=torch.tensor([10.0, 900.0]),
    ).sample
    assert torch.equal(output, torch.zeros(2, 16, 8, 8))


def test_pooled_states_are_the_end_tokens_and_some_captions_are_dropped(material, base) -> None:
    latents, texts, pooled = train_transformer.draw(material, 200, random.Random(0))
    assert [part.shape[1:] for part in (latents, texts, pooled)] == [(16, 8, 8), (24, 128), (128,)]
    silent = (texts == material.cache.empty).flatten(1).all(1)
    assert 0 < silent.sum() < 60
    ids = base.tokenizer(train_unet.training_captions()[0], padding="max_length", return_tensors="pt")["input_ids"]
    end = base.text_encoder(ids).pooler_output[0]
    torch.testing.assert_close(material.cache.texts[0, material.ends[0]].float(), end, atol=2e-3, rtol=2e-3)
    empty = base.text_encoder(base.tokenizer("", padding="max_length", return_tensors="pt")["input_ids"])
    torch.testing.assert_close(pooled[silent][0], empty.pooler_output[0], atol=1e-5, rtol=1e-5)


def test_noise_levels_are_the_schedulers_own_times() -> None:
    torch.manual_seed(0)
    scheduler = architecture.scheduler()
    levels = train_transformer.noise_levels(1000, scheduler.config.shift)
    assert ((levels > 0) & (levels < 1)).all()
    own = scheduler.sigmas[:1000].flip(0)
    assert (levels - own).abs().max() < 5e-3


def test_training_lowers_the_loss_stops_and_resumes(material, tmp_path: Path) -> None:
    def loss(transformer) -> float:
        torch.manual_seed(1)
        latents, texts, pooled = train_transformer.draw(material, 32, random.Random(1))
        noise, levels = torch.randn_like(latents), train_transformer.noise_levels(32, 2.0)
        with torch.no_grad():
            output = transformer(
                torch.lerp(latents, noise, levels[:, None, None, None]), texts, pooled, levels * 1000
            ).sample
        return float(F.mse_loss(output, noise - latents))

    trained = train_transformer.train(material, tmp_path, 2.0, batch=16, max_steps=20)
    assert loss(trained) < 0.9 * loss(architecture.transformer())
    further = train_transformer.train(material, tmp_path, 2.0, resume=True, batch=16, max_steps=22)
    assert loss(further) < loss(trained)
    for name, value in train.latest(tmp_path).state_dict().items():
        torch.testing.assert_close(value, further.state_dict()[name])


def test_the_pipeline_hands_on_the_states_that_the_unet_reads(pipe, base) -> None:
    texts = ["a red penguin in flat style", "two blue robot in mosaic style"]
    states, none, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, num_images_per_prompt=2)
    assert none is None
    torch.testing.assert_close(states[::2], base.encode_prompt(texts, "cpu", 1, False)[0])
    assert torch.equal(states[0], states[1])
    assert torch.equal(pooled[2], pooled[3])
    ids = base.tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(pooled[::2], base.text_encoder(ids).pooler_output)


def test_the_pipelines_negative_prompts_default_to_the_empty_caption(pipe) -> None:
    given = pipe.encode_prompt("a cactus", negative_prompt="")
    default = pipe.encode_prompt("a cactus")
    for a, b in zip(given, default, strict=True):
        assert torch.equal(a, b)
    again = pipe.encode_prompt(
        None, prompt_embeds=default[0], negative_prompt_embeds=default[1],
        pooled_prompt_embeds=default[2], negative_pooled_prompt_embeds=default[3],
    )  # fmt: skip
    assert all(a is b for a, b in zip(again, default, strict=True))


def test_the_pipeline_refuses_what_only_other_text_encoders_could_read(pipe) -> None:
    with pytest.raises(ModelError, match="prompt_3"):
        pipe("a cactus", prompt_3="a carrot")
    with pytest.raises(ModelError, match="3 negative prompts for 2 prompts"):
        pipe.encode_prompt(["a cactus", "a carrot"], negative_prompt=["a", "b", "c"])


def test_the_users_own_call_works_and_depends_on_the_seed_and_the_caption(pipe) -> None:
    def draw(text: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(text, generator=generator, num_inference_steps=2, output_type="pt").images

    first = draw("a red penguin", 0)
    assert first.shape == (1, 3, 64, 64)
    assert torch.equal(first, draw("a red penguin", 0))
    assert not torch.equal(first, draw("a red penguin", 1))
    assert not torch.equal(first, draw("three green cactus", 0))


def test_evaluation_draws_what_the_users_own_call_draws_with_one_seed_a_caption(pipe) -> None:
    settings = Settings(steps=2, guidance=3.0, batch=2)
    texts = ["a red penguin", "a cactus", "a gift"]
    together = evaluate.draw_states(pipe, text_states(pipe, texts), texts, settings)
    alone = pipe(
        "a gift", generator=torch.Generator().manual_seed(2), num_inference_steps=2, guidance_scale=3.0,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-4)


def test_the_noise_check_and_the_report_run_on_the_transformer(pipe) -> None:
    settings = Settings(steps=1, batch=4)
    noise = noise_check.measure(
        pipe, emoji.load_judge("cpu"), emoji.load_scorer("cpu"), 2, settings, scales=(10,), draw=evaluate.draw_states
    )
    assert any(mean for mean, _, _ in noise["10x"]["clip_score"].values())
    table = dict.fromkeys(data.NAMES, (1, 2))
    found = {"held_out": table, "trained": table, "held_out_pairs": {"two, sand": table}, "noise": noise}
    lines = evaluate.report(found).splitlines()
    assert sum("| 50.0% | 9.5% to 90.5% |" in line for line in lines) == len(data.NAMES)
    assert any(line.startswith("| judge | 10x |") for line in lines)


def test_what_is_exported_loads_again_in_halves(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    model.export(pipe.transformer, folder)
    loaded = emoji_dit.load("cpu", folder=folder)
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], value.half().float()), name
    assert "_name_or_path" not in (folder / "transformer" / "config.json").read_text()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"emoji_dit\.train"):
        emoji_dit.load("cpu", folder=tmp_path)


def test_the_shipped_weights_are_small_halves_and_load_without_a_word_or_a_network(monkeypatch, capfd) -> None:
    files = [path for path in model.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    with safe_open(model.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    assert isinstance(emoji_dit.load("cpu"), StableDiffusion3Pipeline)
    assert capfd.readouterr() == ("", "")


def test_the_shipped_weights_draw_what_training_captions_say() -> None:
    chosen = choose(data.training_scenes(), 8)
    texts = [said.text for _, said in chosen]
    shipped = emoji_dit.load("cpu")
    images = evaluate.draw_states(shipped, text_states(shipped, texts), texts, Settings(steps=12))
    right = emoji.load_judge("cpu").labels(images) == labels_of([scene for scene, _ in chosen])
    assert right.float().mean() >= 0.75  # chance is 0.21
