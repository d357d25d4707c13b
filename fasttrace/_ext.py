"""The compiled extension of csrc/, if it was built: loads it once and says why not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def load_error() -> str | None:
    """Load ``torch.ops.fasttrace_ext``. Returns None once it is there, or the reason why it is not."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not libraries:
        return "the extension was not built; reinstall with FASTTRACE_BUILD_EXT=1 and --no-build-isolation"
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None


def available() -> bool:
    """Whether ``torch.ops.fasttrace_ext`` can be called."""
    return load_error() is None
