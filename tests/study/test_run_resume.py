"""Runs that are interrupted, fail or find another study in their folder, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.errors import StudyError
from fasttrace.study.carried import carried, unknown
from fasttrace.study.record import fingerprint
from fasttrace.study.run import run
from tests.pipelines import tiny_pipeline
from tests.study_cases import APPLE, study, table


@pytest.fixture
def exact() -> Any:
    return tiny_pipeline("tiny-sd15", torch.float64)


def counting(fail_at: int | None, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., Tensor]:
    """A metric that counts the calls made of it, and fails at one of them."""

    def brightness(images: Tensor, prompts: list[str]) -> Tensor:
        brightness.calls += 1  # type: ignore[attr-defined]
        if brightness.calls == fail_at:  # type: ignore[attr-defined]
            raise error("stopped")
        return images.mean((1, 2, 3))

    brightness.calls = 0  # type: ignore[attr-defined]
    brightness.version = 1  # type: ignore[attr-defined]  # its scores do not depend on when it fails
    return brightness


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_an_interrupted_run_goes_on_where_it_stopped(exact: Any, tmp_path: Path) -> None:
    def made(fail_at: int | None) -> tuple[ft.Study, Any]:
        metric = counting(fail_at)
        return study(exact, sites="unet.mid*attn*", seeds=[0, 1], metrics=[metric]), metric

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(made(3)[0], out=out, progress=False)
    left = files(out)
    assert sum(name.endswith(".parquet") for name in left) == 2
    assert not any(name.startswith(".") or "effects" in name or "study" in name for name in left)
    rest, metric = made(None)
    resumed = run(rest, out=out, progress=False)
    assert metric.calls == 2  # of four groups, two were kept
    pd.testing.assert_frame_equal(resumed.table, table(made(None)[0]))
    assert "partial" not in files(out)
    done, metric = made(None)
    pd.testing.assert_frame_equal(run(done, out=out, progress=False).table, resumed.table)
    assert metric.calls == 0  # a finished run is read


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_fails_at_once_leaves_nothing_and_the_pipeline_as_it_was(
    error: type[BaseException], tmp_path: Path
) -> None:
    pipe = tiny_pipeline("tiny-sd15")
    before, config = fingerprint(pipe), dict(pipe.config)
    own = pipe.scheduler, dict(pipe.scheduler.config), pipe.unet.attn_processors
    made = study(pipe, sites="unet.mid*", metrics=[counting(1, error)], scheduler="euler")
    with pytest.raises(error, match="stopped"):
        run(made, out=tmp_path / "new", progress=False)
    assert files(tmp_path) == set()
    assert fingerprint(pipe) == before
    assert dict(pipe.config) == config
    assert (pipe.scheduler, dict(pipe.scheduler.config), pipe.unet.attn_processors) == own
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_a_folder_with_another_study_is_refused_with_what_differs(exact: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sites": "unet.mid*attn2", "prompts": [APPLE]}
    run(study(exact, **settings), out=tmp_path, progress=False, pictures=0)
    before = (tmp_path / "effects.parquet").read_bytes()
    with pytest.raises(StudyError, match=r"holds another study: its guidance_scale is 7.5, this one's is 3.0"):
        run(study(exact, guidance_scale=3.0, **settings), out=tmp_path, progress=False)
    assert (tmp_path / "effects.parquet").read_bytes() == before
    replaced = run(study(exact, guidance_scale=3.0, **settings), out=tmp_path, progress=False, overwrite=True)
    pd.testing.assert_frame_equal(ft.Effects.load(tmp_path).table, replaced.table)


def bright(power: float) -> Callable[..., Tensor]:
    return lambda images, prompts: images.mean((1, 2, 3)) ** power


def test_results_of_another_metric_of_the_same_name_are_not_taken_over(exact: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sites": "unet.mid*attn2", "prompts": [APPLE]}
    run(study(exact, metrics=[bright(1)], **settings), out=tmp_path, progress=False, pictures=0)
    run(study(exact, metrics=[bright(1)], **settings), out=tmp_path, progress=False, pictures=0)
    with pytest.raises(StudyError, match=r"holds another study: its callables\.lambda is"):
        run(study(exact, metrics=[bright(2)], **settings), out=tmp_path, progress=False)


def test_results_of_a_pipeline_that_carries_something_else_are_not_taken_over(exact: Any, tmp_path: Path) -> None:
    def again() -> None:
        run(study(exact, sites="unet.mid*attn2", prompts=[APPLE]), out=tmp_path, progress=False, pictures=0)

    again()
    again()
    exact.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(StudyError, match=r"its carried\.unet\.attributes is"):
        again()
    exact.disable_freeu()
    handle = exact.vae.decoder.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(StudyError, match=r"its carried\.vae\.hooks is null"):
        again()
    handle.remove()
    before = exact.tokenizer.model_max_length
    exact.tokenizer.model_max_length = before - 1
    with pytest.raises(StudyError, match=r"its carried\.tokenizer is"):
        again()
    exact.tokenizer.model_max_length = before


def test_all_that_the_packaged_model_carries_has_a_name() -> None:
    assert unknown(carried(ft.load_pipeline("emoji"))) is None


def test_what_cannot_be_named_is_said_and_not_reused(exact: Any, tmp_path: Path) -> None:
    endless = (value for value in range(10**9))
    made = study(
        exact,
        sites="unet.mid*attn2",
        prompts=[APPLE],
        metrics=[lambda images, _: images.mean((1, 2, 3)) + next(endless)],
    )
    run(made, out=tmp_path, progress=False, pictures=0)
    with pytest.raises(StudyError, match=r"the state of lambda \(builtins\.generator\) cannot be read; give it"):
        run(made, out=tmp_path, progress=False, pictures=0)
