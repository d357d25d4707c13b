"""Markers, and the small pipelines that most tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pipelines import TINY, tiny_pipeline


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
