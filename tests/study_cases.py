"""Small studies of tiny pipelines, and how their tables are compared."""

from __future__ import annotations

from typing import Any

import pandas as pd

import fasttrace as ft
from fasttrace.study.job import Job, Options, Traced
from fasttrace.study.run import run

APPLE = ft.Prompt("a red apple on a table", "apple", id="apple", target="a red pizza on a table")
CAT = ft.Prompt("a photo of a small cat", "small cat", id="cat", attribute="animal", target="a photo of a dog")
# In double precision, rounding is out of the way and "equal" can be said sharply.
EXACT = 1e-8


def study(pipe: Any, **settings: Any) -> ft.Study:
    defaults: dict[str, Any] = {
        "prompts": [APPLE, CAT], "metrics": ["latent_l2"], "num_inference_steps": 2, "scheduler": "ddim",
        "corruption": ft.GaussianNoise(2.0),
    }  # fmt: skip
    return ft.Study(pipe, **{**defaults, **settings})


def table(made: ft.Study, engine: str = "fast", **options: Any) -> pd.DataFrame:
    return run(made, engine, progress=False, **options).to_pandas()


def traced(made: ft.Study, engine: str = "fast") -> Traced:
    """The first group of a study."""
    plan = made.plan()
    return next(Job(plan.study, Options(engine)).trace(plan.groups[:1], lambda _: None))


def assert_same(left: pd.DataFrame, right: pd.DataFrame, tolerance: float = EXACT) -> None:
    pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=0, atol=tolerance)
