"""The shell: what a newcomer types, what a mistake says, and what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fasttrace.cli.app import app
from fasttrace.cli.study import numbers, read_request
from fasttrace.effects.effects import Effects
from fasttrace.errors import StudyError

MODEL = "random:tiny-sd15"
PROMPT = ["--prompt", "a red apple", "--subject", "apple"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from fasttrace.cli.app import app; "
        "print(CliRunner().invoke(app, ['--help']).output); "
        "print('heavy:', [m for m in ('torch', 'pandas', 'matplotlib', 'diffusers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("demo", "sites", "plan", "sweep", "report", "edit", "profile", "tune"):
        assert f" {name} " in output
    assert "heavy: []" in output


def test_sites_lists_what_a_glob_matches():
    result = run("sites", MODEL, "unet.mid_block*")
    assert result.exit_code == 0
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2" in result.output
    assert "5 sites" in result.output


def test_plan_counts_without_running():
    result = run("plan", MODEL, *PROMPT, "--sites", "unet.mid_block*", "--num-inference-steps", 3)
    assert result.exit_code == 0
    assert "5 restored runs" in result.output


def test_sweep_leaves_a_table_a_record_and_a_report(tmp_path):
    out = tmp_path / "trace"
    options = ["--sites", "unet.mid_block*", "--num-inference-steps", 2, "--seeds", "0-1", "--out", out]
    result = run("sweep", MODEL, *PROMPT, *options)
    assert result.exit_code == 0, result.output
    assert "brings back most" in " ".join(result.output.split())
    effects = Effects.load(out)
    assert effects.table["site"].nunique() == 5
    assert effects.record["seeds"] == [0, 1]
    assert (out / "report" / "index.html").is_file()
    again = run("report", out, "--out", tmp_path / "page")
    assert again.exit_code == 0
    assert (tmp_path / "page" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere/at/all", *PROMPT], "cannot load"),
        ([MODEL], "no prompts: give --prompt"),
        ([MODEL, "--prompt", "a red apple"], "no prompts: give --prompt"),
        ([MODEL, *PROMPT, "--prompt", "a cat"], "2 --prompt but 1 --subject"),
        ([MODEL, "--prompt", "a red apple", "--subject", "pear"], "'pear' does not stand in"),
        ([MODEL, "--prompts", "missing.jsonl"], "no prompt file"),
        ([MODEL, *PROMPT, "--prompts", "objects"], "--prompts excludes"),
        ([MODEL, "--prompts", "objects", "--target", "a pear"], "--prompts excludes"),
        ([MODEL, "--prompts", "objects", "--attribute", "color"], "--prompts excludes"),
        ([MODEL, *PROMPT, "--sites", "unet.sideways*"], "no site matches"),
        ([MODEL, *PROMPT, "--metric", "latent_l3"], "unknown metric"),
        ([MODEL, *PROMPT, "--metric", "noise_l2"], "it can serve"),
        ([MODEL, *PROMPT, "--metric", "clip_score"], "name a CLIP"),
        ([MODEL, *PROMPT, "--seeds", "one"], "--seeds 'one'"),
        ([MODEL, *PROMPT, "--steps", "windows:x"], "windows:WIDTH"),
        ([MODEL, *PROMPT, "--noise", "loud"], "corruption scale 'loud'"),
        ([MODEL, *PROMPT, "--preset", "slow"], "no preset 'slow'"),
        ([MODEL, *PROMPT, "--dtype", "float99"], "--dtype"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_leaves_nothing(arguments, problem, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("sweep", *arguments, "--out", tmp_path / "trace")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert problem in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_folder_without_a_run_is_refused(tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "effects.parquet" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_options_are_read():
    assert numbers("0,2-4", "--seeds") == [0, 2, 3, 4]
    for text in ("3-1", "0,3-1", "a", "1-", "-1", ""):
        with pytest.raises(StudyError, match="--seeds"):
            numbers(text, "--seeds")
    settings = read_request(
        "m", ["a red apple"], ["apple"], sites=["unet.*.attn1 + unet.*.attn2"], steps=["windows:5:2"], positions=["3,4"]
    ).settings
    assert settings["sites"] == [("unet.*.attn1", "unet.*.attn2")]
    assert settings["steps"] == {"width": 5, "stride": 2}
    assert settings["positions"] == [3, 4]
    settings = read_request("m", ["a red apple"], ["apple"], steps=["windows:5"]).settings
    assert settings["steps"] == {"width": 5, "stride": 1}  # as in Python, where no stride means one


def test_version_is_said():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("fasttrace ")


def test_sites_as_json():
    result = run("sites", MODEL, "unet.mid_block*", "--json")
    rows = json.loads(result.output)
    assert result.exit_code == 0
    assert len(rows) == 5
    assert set(rows[0]) == {"site", "part", "kind", "layer", "module"}


def test_tune_shows_and_forgets_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    empty = run("tune")
    assert empty.exit_code == 0
    assert "No CUDA card" in empty.output
    assert "No choices" in empty.output
    file = tmp_path / "fasttrace" / "choices.json"
    file.parent.mkdir()
    kept = {"A card": {"geglu r16 float16": {"implementation": "triton", "us": {"triton": 5.0, "reference": 9.5}}}}
    file.write_text(json.dumps(kept))
    shown = run("tune")
    assert shown.exit_code == 0
    for text in ("A card", "geglu r16 float16", "triton 5, reference 9.5", "1 choice in"):
        assert text in shown.output
    assert run("tune", "--forget").exit_code == 0
    assert not file.exists()


def test_the_shell_names_its_own_option_to_overwrite(monkeypatch):
    def refuse(*_, **__):
        raise StudyError("holds another study; choose another folder, or overwrite=True")

    monkeypatch.setattr("fasttrace.pipeline.load_pipeline", refuse)
    result = run("sites", MODEL)
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith("or --overwrite")
