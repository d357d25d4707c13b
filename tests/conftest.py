"""Markers, and the small pipelines that most tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fasttrace as ft

TINY = ("tiny-sd15", "tiny-sd21", "tiny-sdxl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: run with --slow")
    gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: run `make gpu` on one")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny shapes gain nothing from a second thread, and the suite may run in several processes."""
    torch.set_num_threads(1)


_pipelines: dict[tuple[str, torch.dtype], Any] = {}


def tiny_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random pipeline that the whole session shares; tests must leave it as it is."""
    if (name, dtype) not in _pipelines:
        _pipelines[name, dtype] = ft.zoo.random_pipeline(name, dtype=dtype)
    return _pipelines[name, dtype]


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Any:
    """Each of the tiny SD1.x-, SD2.x- and SDXL-shaped pipelines."""
    return tiny_pipeline(request.param)


@pytest.fixture
def tiny_sd15() -> Any:
    return tiny_pipeline("tiny-sd15")


@pytest.fixture
def tiny_sdxl() -> Any:
    return tiny_pipeline("tiny-sdxl")
