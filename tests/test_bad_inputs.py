"""Bad inputs, by table: each ends in an error that says what to do, never in a traceback of something else."""

from __future__ import annotations

import math

import pytest
from typer.testing import CliRunner

import fasttrace as ft
from fasttrace.cli.app import app
from fasttrace.errors import FasttraceError
from fasttrace.zoo import random_pipeline

NAN, INF = math.nan, math.inf
APPLE = ft.Prompt("a red apple", "apple")

STUDY = [
    *({"guidance_scale": bad} for bad in (NAN, INF, -INF, "7", None, True, 1j, [7.5])),
    *({"eta": bad} for bad in (-1, -0.1, NAN, INF, "0", None, True)),
    *({"seeds": bad} for bad in ((), -1, 2**63, 2**64, [2**70], [0, 0], [0.5], 0.5, "a", True, [None], range(10**9))),
    *({"num_inference_steps": bad} for bad in (0, -1, 10**9, 2**70, 2.0, "20", None, True)),
    *({"windows": bad} for bad in (0, -1, 1.5, "2", None, 10**9)),
    *({"sites": bad} for bad in ((), [], [()], None, 7, "", "unett", ["unet", 3], [None])),
    *({"positions": bad} for bad in ("nowhere", 5, [0.5], [None], {"a": 1})),
    *({"steps": bad} for bad in ("sometimes", [99], [-1], [0.5], 5, {"width": 0}, {"stride": 1}, {"width": 2.5})),
    *({name: bad} for name in ("protocol", "base", "branch", "scored_text", "source") for bad in ("other", 3)),
    *({"scheduler": bad} for bad in ("none", 3, ...)),
    *({"negative_prompt": bad} for bad in (None, 3, ["x"])),
    *({"corruption": bad} for bad in (None, 3.0, "3x")),
    *({"sources": bad} for bad in (None, {"x": 3}, {"clean": "x"})),
    *({"metrics": bad} for bad in ("unknown", [3], 3, None)),
    *({"prompts": bad} for bad in ([], None, 3, ["a"], [APPLE, APPLE])),
]

PROMPTS = [
    {"text": ""}, {"text": None}, {"text": 3}, {"text": "a red \ud800 apple"}, {"subject": ""}, {"subject": "pear"},
    {"subject": None}, {"subject": "\udfff"}, {"id": 3}, {"id": 1.5}, {"id": "\ud800"}, {"target": 3},
    {"target": "\ud800"}, {"span": (0,)}, {"span": (5, 2)}, {"span": (0.5, 2)}, {"span": (0, 999)}, {"seeds": 3},
    {"seeds": (0.5,)}, {"seeds": ()},
]  # fmt: skip

SWEEP = ("sweep", "random:tiny-sd15", "--prompt", "a red apple", "--subject", "apple")
SHELL = [
    *((*SWEEP, "--device", bad) for bad in ("foo", "meta", "cuda:99", "cpu:x", "")),
    *((*SWEEP, "--dtype", bad) for bad in ("int8", "bool", "complex64", "nn", "")),
    *((*SWEEP, "--seeds", bad) for bad in ("0-999999999", "9" * 5000, str(2**64), "-1", "a", "3-1", "", "0,0")),
    *((*SWEEP, "--min-clean", bad) for bad in ("nan", "inf")),
    *((*SWEEP, "--guidance-scale", bad) for bad in ("nan", "inf")),
    (*SWEEP, "--eta", "-1"),
    (*SWEEP, "--out", ""),
    (*SWEEP, "--num-inference-steps", "1000000000"),
    (*SWEEP, "--sites", "unett"),
    *(("edit", "owl=robot", "--guidance", bad) for bad in ("nan", "inf")),
    ("edit", "owl=zeppelin"),
    ("edit", "owl"),
    ("edit", "owl=robot", "--out", ""),
    ("edit", "owl=robot", "--device", "foo"),
]


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline("tiny-sd15")


@pytest.mark.parametrize("bad", STUDY, ids=lambda bad: str(bad)[:60])
def test_a_study_refuses(pipe, bad):
    given = {"prompts": [APPLE], "metrics": ["latent_l2"], **bad}
    with pytest.raises(FasttraceError):
        ft.Study(pipe, **given)


@pytest.mark.parametrize("bad", PROMPTS, ids=lambda bad: ascii(bad)[:60])
def test_a_prompt_refuses(bad):
    with pytest.raises(FasttraceError):
        ft.Prompt(**{"text": "a red apple", "subject": "apple", **bad})


@pytest.mark.parametrize("arguments", SHELL, ids=lambda arguments: " ".join(arguments[-2:])[:60])
def test_the_shell_says_one_line_and_writes_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())
