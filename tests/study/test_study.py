"""What a study accepts, what it refuses by name, and that its JSON repeats it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fasttrace as ft
from fasttrace.errors import FasttraceError, MetricError, PromptError, SiteError, StudyError
from fasttrace.study.presets import PRESETS, find_preset, preset_study
from fasttrace.study.record import field_lines, fingerprint, study_record
from tests.pipelines import tiny_pipeline

APPLE = ft.Prompt("a red apple on a table", "apple", id="apple", target="a red pizza on a table")
CAT = ft.Prompt("a photo of a small cat", "small cat", id="cat", attribute="animal", seeds=(5, 2))


def study(pipe: Any, **settings: Any) -> ft.Study:
    return ft.Study(pipe, **{"prompts": [APPLE, CAT], "metrics": ["latent_l2"], "num_inference_steps": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a cat"]}, r"prompts\[0\]='a cat': expected ft.Prompt"),
        ({"prompts": [APPLE, APPLE]}, "two prompts have the id 'apple'"),
        ({"seeds": []}, r"seeds=\[\]"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: expected different"),
        ({"seeds": [-1]}, r"seeds=\[-1\]"),
        ({"protocol": "forced"}, "protocol='forced': expected one of free, teacher_forced"),
        ({"base": "restored"}, "base='restored': expected one of corrupted, clean"),
        ({"branch": "all"}, "branch='all'"),
        ({"corruption": 0.3}, r"corruption=0\.3: expected ft\.GaussianNoise"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": "7.5"}, "guidance_scale='7.5': expected a number"),
        ({"eta": float("nan")}, "eta=nan: expected a number"),
        ({"negative_prompt": None}, "negative_prompt=None: expected text"),
        ({"sources": {"dog": 3}}, r"sources\['dog'\]=3: expected text"),
        ({"steps": 3}, "steps=3"),
        ({"source": "corrupted"}, "source='corrupted' is the base itself"),
        ({"source": "dog"}, "source='dog': expected one of clean, corrupted, target, empty, zero, mean, inject:clean"),
        ({"source": "target"}, "prompt 'cat' has no target"),
        ({"scored_text": "target"}, "prompt 'cat' has no target"),
        ({"sources": {"mean": "a dog"}}, "sources has the name 'mean'"),
        ({"source": "inject:empty"}, r"source='inject:empty' feeds cross-attention, but unet.*resnet"),
        ({"source": "inject:empty", "sites": "*attn2", "branch": "both"}, "leave out protocol, positions and branch"),
        ({"source": "mean", "protocol": "teacher_forced", "metrics": ["noise_l2"]}, 'use protocol="free"'),
        ({"sites": []}, "sites is empty"),
        ({"sites": [3]}, "sites has 3: expected a name"),
        ({"windows": 2, "sites": [("unet.mid*",)]}, "windows=2 with a set of sites"),
        ({"windows": 99, "sites": "*attn2"}, "windows=99: no 99 adjacent layers"),
        ({"steps": [9]}, "steps has 9: expected 0 to 4"),
        ({"steps": [[0, 1], 2]}, "steps has 2: expected a set of indices"),
        ({"steps": [[0, 2], [0, 1, 2]]}, "steps has two sets from 0 to 3"),
        ({"steps": "last"}, "steps='last'"),
        ({"steps": {"width": 9}}, "steps={'width': 9}: expected a width from 1 to 5"),
        ({"steps": {"window": 2}}, "steps={'window': 2}"),
        ({"steps": [1], "sites": "text"}, r"steps=\[1\]: a text encoder runs once"),
        ({"positions": "each"}, "positions='each': UNet sites have pixels"),
        ({"positions": ["subject", "head"], "sites": "text"}, "positions has 'head'"),
        ({"positions": [[1.5]], "sites": "text"}, r"positions has \[1\.5\]"),
        ({"positions": [3], "sites": "all"}, "tokens at text sites and pixels in the UNet"),
        ({"scheduler": "ddpm++"}, "scheduler='ddpm\\+\\+': expected one of ddim, pndm"),
        ({"scheduler": 3}, "scheduler=3"),
        ({"sigma": {"unet": 1.0}}, "sigma={'unet': 1.0}: expected a mapping with one number for each of text_encoder"),
        ({"sigma": 1.0}, "sigma=1.0: expected a mapping with one number for each of text_encoder"),
        ({"sigma": {"text_encoder": -1.0}}, r"sigma\['text_encoder'\]=-1.0: expected a number >= 0"),
        ({"sources": ["a dog"]}, r"sources=\['a dog'\]: expected a mapping of names to texts"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(tiny_sd15: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(tiny_sd15, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sites": "unet.mid_blok*"}, SiteError, "nearest: unet.mid_block"),
        ({"metrics": ["noise_l2"]}, MetricError, "free.*latent_l2"),
        ({"metrics": ["latent_l3"]}, MetricError, "did you mean 'latent_l2'"),
        ({"prompts": [ft.Prompt("a cat " * 90 + "and a dog", "dog")]}, PromptError, "cut off"),
    ],
)
def test_errors_of_other_parts_come_through(
    tiny_sd15: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        study(tiny_sd15, **settings)


def test_the_noise_scale_is_resolved_for_each_encoder_from_all_subjects() -> None:
    pipe = tiny_pipeline("tiny-sdxl")
    made = study(pipe, corruption=ft.GaussianNoise("3x"))
    for part, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        words = {token for word in ("apple", "small", "cat") for token in tokenizer(word)["input_ids"][1:-1]}
        table = getattr(pipe, part).get_input_embeddings().weight
        expected = 3 * table[sorted(words)].double().std(correction=0)
        assert made.sigma[part] == pytest.approx(float(expected))
    assert made.sigma["text_encoder"] != made.sigma["text_encoder_2"]


def test_a_subset_keeps_the_noise_of_the_whole(tiny_sd15: Any) -> None:
    whole = study(tiny_sd15, seeds=[0, 5])
    half = whole.subset(prompts=["cat"], seeds=[5])
    assert [prompt.id for prompt in half.prompts] == ["cat"]
    assert half.seeds_of(half.prompts[0]) == (5,)
    assert half.sigma == whole.sigma != study(tiny_sd15, prompts=[CAT]).sigma
    with pytest.raises(StudyError, match="no prompt 'dog'"):
        whole.subset(prompts=["dog"])
    with pytest.raises(StudyError, match="no seed 7"):
        whole.subset(seeds=[7])
    with pytest.raises(StudyError, match="prompts is empty"):
        whole.subset(prompts=["apple"], seeds=[2])


def test_a_named_scheduler_keeps_the_noise_schedule_and_leaves_the_pipeline_alone() -> None:
    pipe = tiny_pipeline("tiny-sd21")
    own, config = pipe.scheduler, dict(pipe.config)
    made = study(pipe, scheduler="euler", prompts=[APPLE])
    assert type(made.traced_pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert made.traced_pipe.scheduler.config.prediction_type == "v_prediction"
    assert made.traced_pipe.scheduler.config.beta_end == own.config.beta_end
    assert pipe.scheduler is own
    assert dict(pipe.config) == config
    assert made.traced_pipe.unet is pipe.unet


FULL = [
    {"sites": "unet", "seeds": np.arange(2), "steps": np.arange(3)},
    {"sites": "unet", "steps": "each", "protocol": "teacher_forced", "metrics": ["noise_l2", "noise_cosine"]},
    {"sites": ["unet.mid*", ("unet.*attn1", "unet.*attn2")], "steps": [range(2), (2, 3)], "branch": "both", "eta": 0.5},
    {"sites": "unet*attn2", "windows": 2, "steps": {"width": 2, "stride": 2}, "scheduler": "euler_ancestral"},
    {"sites": "text", "positions": ["subject_last", [1, 2], 4], "metrics": ["text_l2"], "negative_prompt": "snow"},
    {"sites": "text", "base": "clean", "source": "dog", "sources": {"dog": "a red dog"}, "positions": "all"},
    {
        "prompts": [APPLE],
        "source": "target",
        "base": "clean",
        "scored_text": "target",
        "corruption": ft.GaussianNoise(2),
    },
]


@pytest.mark.parametrize("settings", FULL, ids=range(len(FULL)))
def test_a_study_comes_back_from_its_json(tiny_sd15: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    made = study(tiny_sd15, **settings)
    made.to_json(tmp_path / "study.json")
    back = ft.Study.from_json(tmp_path, tiny_sd15)
    assert study_record(back) == json.loads((tmp_path / "study.json").read_text()) == study_record(made)
    assert [one.runs for one in back.plan().prompts] == [one.runs for one in made.plan().prompts]
    assert back.sigma == made.sigma


def test_a_study_of_another_model_or_with_wrong_fields_is_refused(tiny_sd15: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    study(tiny_sd15).to_json(path)
    record = json.loads(path.read_text())
    with pytest.raises(StudyError, match="was made with another model"):
        ft.Study.from_json(path, ft.zoo.random_pipeline("tiny-sd15", seed=1))
    good, bad = record["prompts"]
    for field, value, message in (
        ("sead", 1, "unknown field 'sead'; expected base"),
        ("protocol", "x", "protocol='x'"),
        ("format", 9, "format 9"),
        ("prompts", 3, "prompts is 3: expected a list"),
        ("prompts[1]", [good, {**bad, "txt": "x"}], r"prompts\[1\] has the unknown field 'txt'"),
        ("prompts[1]", [good, {**bad, "subject": "cow"}], "the subject 'cow' does not stand in"),
        ("prompts", [good, "cat"], "prompts has 'cat': expected an object"),
        ("corruption", {"scale": 1, "sample": 2}, "corruption: .*'sample'"),
        ("corruption", {"scale": "much"}, "corruption: corruption scale 'much'"),
        ("scheduler", {"class": "os.system", "config": {}}, "scheduler 'os.system' is not in diffusers"),
        ("sites", "unet.nowhere", "no site matches 'unet.nowhere'"),
        ("sites", 3, "sites"),
        ("seeds", None, "seeds=None: expected a list"),
        ("metrics", ["latent_l3"], "latent_l3"),
        ("steps", [99], "steps has 99"),
    ):
        path.write_text(json.dumps({**record, field.partition("[")[0]: value}, indent=2))
        line = field_lines(path.read_text())[field]
        expected = rf"study\.json, line {line}: .*{message}"
        with pytest.raises(FasttraceError, match=expected):
            ft.Study.from_json(path, tiny_sd15)
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "sigma"}))
    with pytest.raises(StudyError, match="no field 'sigma'"):
        ft.Study.from_json(path, tiny_sd15)


def test_lines_are_those_of_the_fields_themselves() -> None:
    text = '{"a": {"b": 1,\n"c": "}{\\"x\\": ["}, "list": [\n{"a": 2},\n\n{}],\n"b" : 3\n}'
    assert json.loads(text)["b"] == 3
    assert field_lines(text) == {"a": 1, "list": 2, "list[0]": 3, "list[1]": 5, "b": 6}


def test_a_metric_that_was_a_callable_has_to_be_given_again(tiny_sd15: Any, tmp_path: Path) -> None:
    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    study(tiny_sd15, metrics=[brightness]).to_json(tmp_path / "study.json")
    with pytest.raises(MetricError, match="brightness"):
        ft.Study.from_json(tmp_path, tiny_sd15)
    back = ft.Study.from_json(tmp_path, tiny_sd15, metrics=[brightness])
    assert [metric.name for metric in back.resolved_metrics] == ["brightness"]


def test_a_fingerprint_sees_one_changed_weight() -> None:
    pipe = ft.zoo.random_pipeline("tiny-sd15")
    before = fingerprint(pipe)
    assert before == fingerprint(tiny_pipeline("tiny-sd15"))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[7, 3] += 1e-3
    assert fingerprint(pipe) != before


def test_presets_say_what_they_fix_and_can_be_overridden(tiny_sd15: Any) -> None:
    made = preset_study("paper", tiny_sd15, [APPLE], metrics=["latent_l2"], num_inference_steps=3)
    assert made.preset == study_record(made)["preset"] == "paper"
    assert made.step_count == 4  # PNDM takes one more
    kinds = {one.kind for one in made.site_sets}
    assert kinds == {"resnet", "self_attn", "cross_attn", "mlp"}
    assert {one.part for one in made.site_sets} == {"text_encoder", "unet"}
    runs = made.plan().prompts[0].runs
    eos = made.tokens["text_encoder"]["apple"].eos
    assert {run.position for run in runs if run.site_set.has_text} == set(range(eos + 1))
    for preset in PRESETS.values():
        text = preset.describe()
        for name, setting in preset.settings.items():
            assert re.search(rf"^  {name} = .*{re.escape(setting.why)}$", text, flags=re.MULTILINE)
    with pytest.raises(StudyError, match="no preset 'papr': expected one of paper, quick"):
        find_preset("papr")
