"""``fasttrace plan``: what a sweep would cost."""

from __future__ import annotations

from .console import console
from .study import Request, takes_study


@takes_study
def plan(request: Request) -> None:
    """Say what a sweep would cost, without running it: runs, UNet forwards beside the naive count, memory."""
    study = request.study()
    console().print(f"{request.describe()}{study.plan().summary()}", highlight=False, soft_wrap=True)
