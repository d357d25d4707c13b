"""Metrics against their formulas, judges against transformers, and what is refused."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fasttrace.errors import MetricError
from fasttrace.metrics.metrics import RunBatch, resolve_metrics, served_names
from fasttrace.metrics.scorers import HubClip, clip_scores
from fasttrace.zoo import random_pipeline
from tests.pipelines import tiny_pipeline


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 4, steps: int = 3) -> RunBatch:
    """Random runs; row 0 is the clean run, row 1 lies near to it."""
    draw = generator()
    values = {
        "latents": torch.randn(n, 4, 5, 3, generator=draw),
        "text": torch.randn(n, 7, 6, generator=draw),
        "outputs": torch.randn(n, steps, 4, 5, 3, generator=draw),
    }
    for value in values.values():
        value[1] = value[0] + 0.1 * torch.randn(value[0].shape, generator=draw)
    clean = {f"clean_{name}": value[0].clone() for name, value in values.items()}
    return RunBatch(prompts=["p"] * n, **values, **clean)


NAMES = {"free": ["latent_cosine", "latent_l2"], "teacher_forced": ["noise_cosine", "noise_l2"]}
TEXT = ["text_cosine", "text_l2"]


@pytest.mark.parametrize("protocol", ["free", "teacher_forced"])
def test_the_clean_run_scores_best_and_a_near_run_next(protocol):
    for metric in resolve_metrics([*NAMES[protocol], *TEXT], tiny_pipeline("tiny-sd15"), protocol):
        scores = metric.score(batch())
        assert scores.shape == (4,)
        assert scores.dtype == torch.float32
        assert scores[0] == pytest.approx(1.0 if "cosine" in metric.name else 0.0, abs=1e-6)
        assert scores[0] > scores[1] > scores[2:].max()


def test_scores_follow_their_formulas():
    runs = batch()
    metrics = resolve_metrics([*NAMES["free"], *TEXT], tiny_pipeline("tiny-sd15"), "free")
    metrics += resolve_metrics(NAMES["teacher_forced"], tiny_pipeline("tiny-sd15"), "teacher_forced")
    scores = {metric.name: metric.score(runs).numpy() for metric in metrics}

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def distance(a, b):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    latents, text, outputs = (getattr(runs, name).double().numpy() for name in ("latents", "text", "outputs"))
    for n in range(4):
        expected = {
            "latent_cosine": cosine(latents[n].ravel(), latents[0].ravel()),
            "latent_l2": -distance(latents[n].ravel(), latents[0].ravel()),
            "text_cosine": np.mean([cosine(text[n, t], text[0, t]) for t in range(7)]),
            "text_l2": -distance(text[n].ravel(), text[0].ravel()),
            "noise_cosine": np.mean([cosine(outputs[n, s].ravel(), outputs[0, s].ravel()) for s in range(3)]),
            "noise_l2": -np.mean([distance(outputs[n, s].ravel(), outputs[0, s].ravel()) for s in range(3)]),
        }
        for name, value in expected.items():
            assert scores[name][n] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_x0_is_recovered_from_any_kind_of_output(kind, name):
    """x0_l2 of a run that predicts x0 + d is minus |d| / |x0|, whatever the model was trained to predict."""
    scheduler = getattr(diffusers, name)(
        prediction_type=kind, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    scheduler.set_timesteps(5)  # Euler's then fall between training timesteps
    x0 = torch.randn(4, 8, 8, generator=generator(), dtype=torch.float64)
    noise = torch.randn(4, 8, 8, generator=generator(1), dtype=torch.float64)
    wrong = x0 + 0.2 * torch.randn(4, 8, 8, generator=generator(2), dtype=torch.float64)
    if name == "EulerDiscreteScheduler":
        signal = 1 / (1 + scheduler.sigmas[:-1].double() ** 2).sqrt()
    else:
        signal = scheduler.alphas_cumprod.double()[scheduler.timesteps].sqrt()
    signal = signal.reshape(-1, 1, 1, 1)
    sigma = (1 - signal**2).sqrt()
    inputs = signal * x0 + sigma * noise

    def output(target):
        implied = (inputs - signal * target) / sigma
        return {"epsilon": implied, "v_prediction": signal * implied - sigma * target}.get(
            kind, target.expand_as(inputs)
        )

    pipe = random_pipeline("tiny-sd15")
    pipe.scheduler = scheduler
    outputs = torch.stack([output(x0), output(wrong)])
    runs = RunBatch(
        prompts=["p"] * 2, outputs=outputs, clean_outputs=outputs[0], timesteps=scheduler.timesteps, inputs=inputs
    )
    (metric,) = resolve_metrics(["x0_l2"], pipe, "teacher_forced")
    expected = -float((wrong - x0).norm() / x0.norm())
    assert metric.score(runs).tolist() == pytest.approx([0.0, expected], abs=1e-5)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, saved as transformers saves one."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from fasttrace.zoo.offline_tokenizer import offline_tokenizer

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=1000, bos_token_id=998, eos_token_id=999, pad_token_id=999, **small)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    offline_tokenizer(1000).save_pretrained(folder)
    return folder


def test_clip_score_is_that_of_transformers(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    images = torch.rand(3, 3, 48, 64, generator=generator())
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)  # smooth, as pictures are
    prompts = ["a red apple", "a cat", "a red apple"]
    (metric,) = resolve_metrics([f"clip_score:{clip_folder}"], tiny_pipeline("tiny-sd15"), "free")
    scores = metric.score(RunBatch(prompts=prompts, images=images))

    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(-1)
    # transformers resizes 8-bit pictures, so the two agree up to that rounding.
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=0.2)


def test_clip_score_does_not_depend_on_batch_mates(clip_folder):
    scorer = HubClip(str(clip_folder), torch.device("cpu"))
    images = torch.rand(70, 3, 32, 32, generator=generator())
    prompts = [f"a {'cat' if i % 3 else 'dog'}" for i in range(70)]
    together = clip_scores(scorer, images, prompts)
    alone = torch.cat([clip_scores(scorer, images[i : i + 1], prompts[i : i + 1]) for i in (0, 64, 69)])
    assert together[[0, 64, 69]].tolist() == pytest.approx(alone.tolist(), abs=1e-4)


def test_x0_clip_score_decodes_and_averages_over_steps(clip_folder):
    pipe = random_pipeline("tiny-sd15")
    pipe.scheduler.set_timesteps(3)
    draw = generator()
    outputs, inputs = torch.randn(2, 4, 4, 8, 8, generator=draw), torch.randn(4, 4, 8, 8, generator=draw)
    runs = RunBatch(
        prompts=["a cat", "a dog"],
        outputs=outputs,
        clean_outputs=outputs[0],
        timesteps=pipe.scheduler.timesteps,
        inputs=inputs,
    )
    (metric,) = resolve_metrics([f"x0_clip_score:{clip_folder}"], pipe, "teacher_forced")
    scores = metric.score(runs)
    by_step = [
        metric.score(
            RunBatch(
                prompts=runs.prompts,
                outputs=outputs[:, s : s + 1],
                clean_outputs=outputs[0, s : s + 1],
                timesteps=runs.timesteps[s : s + 1],
                inputs=inputs[s : s + 1],
            )
        )
        for s in range(4)
    ]
    assert scores.tolist() == pytest.approx(torch.stack(by_step).mean(0).tolist(), abs=1e-4)
    with pytest.raises(MetricError, match="need outputs, inputs and timesteps"):
        metric.score(RunBatch(prompts=["a cat"], outputs=outputs[:1], clean_outputs=outputs[0]))


def test_packaged_scorer_is_for_the_packaged_vocabulary_and_apart_from_the_pipeline():
    import fasttrace as ft

    pipe = ft.load_pipeline("emoji", device="cpu")
    (metric,) = resolve_metrics(["clip_score"], pipe, "free")
    runs = RunBatch(prompts=["a mushroom in flat style"] * 2, images=torch.rand(2, 3, 64, 64, generator=generator()))
    before = metric.score(runs)
    for parameter in pipe.text_encoder.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(metric.score(runs), before)
    (again,) = resolve_metrics(["clip_score"], pipe, "free")
    assert torch.equal(again.score(runs), before)


def test_clip_score_alone_is_refused_for_other_models():
    with pytest.raises(MetricError, match=r"clip_score:openai/clip-vit-large-patch14.*latent_cosine"):
        resolve_metrics(["clip_score"], tiny_pipeline("tiny-sd15"), "free")


def test_a_judge_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MetricError, match="no CLIP in"):
        resolve_metrics([f"clip_score:{tmp_path}"], tiny_pipeline("tiny-sd15"), "free")


def test_callables_score_pictures():
    def brightness(images, prompts):
        return [float(image.mean()) for image in images]

    (metric,) = resolve_metrics([brightness], tiny_pipeline("tiny-sd15"), "free")
    assert (metric.name, metric.needs) == ("brightness", "images")
    images = torch.rand(3, 3, 4, 4, generator=generator())
    assert metric.score(RunBatch(prompts=["p"] * 3, images=images)).tolist() == pytest.approx(
        images.mean((1, 2, 3)).tolist()
    )


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda images, prompts: images.mean(), r"shape \[\]: expected \[2\]"),
        (lambda images, prompts: [1.0, float("nan")], "gave nan for run 1"),
        (lambda images, prompts: ["good", "bad"], "returned list, not numbers"),
    ],
)
def test_callables_that_return_something_else_are_named(function, problem):
    (metric,) = resolve_metrics([function], tiny_pipeline("tiny-sd15"), "free")
    with pytest.raises(MetricError, match=problem):
        metric.score(RunBatch(prompts=["p"] * 2, images=torch.rand(2, 3, 4, 4)))


@pytest.mark.parametrize(
    ("metrics", "protocol", "parts", "problem"),
    [
        (["latent_l3"], "free", ["unet"], "did you mean 'latent_l2'"),
        (["latent_l2"], "teacher_forced", ["unet"], r"needs latents.*it can serve noise_cosine, noise_l2"),
        (["noise_l2"], "free", ["unet"], r"needs outputs.*it can serve clip_score, latent_cosine, latent_l2$"),
        (["text_l2"], "free", ["unet"], "no UNet site can change"),
        (["text_l2", "text_l2"], "free", ["text_encoder"], "given twice"),
        (["latent_l2:openai"], "free", ["unet"], "only clip_score and x0_clip_score take a model"),
        ([], "free", ["unet"], "no metrics: choose from"),
        ([3], "free", ["unet"], "expected a name or a callable"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_can(metrics, protocol, parts, problem):
    with pytest.raises(MetricError, match=problem):
        resolve_metrics(metrics, tiny_pipeline("tiny-sd15"), protocol, parts=parts)


def test_text_metrics_are_served_for_text_sites_of_any_protocol():
    for protocol in ("free", "teacher_forced"):
        assert set(TEXT) <= set(served_names(protocol, ["text_encoder"]))
        assert not set(TEXT) & set(served_names(protocol, ["text_encoder", "unet"]))


def test_runs_without_what_a_metric_reads_are_named():
    (metric,) = resolve_metrics(["latent_l2"], tiny_pipeline("tiny-sd15"), "free")
    with pytest.raises(MetricError, match="needs latents"):
        metric.score(RunBatch(prompts=["p"]))
    with pytest.raises(MetricError, match="clean_latents is missing"):
        metric.score(RunBatch(prompts=["p"], latents=torch.zeros(1, 4, 8, 8)))
