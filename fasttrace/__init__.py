"""fasttrace: causal tracing and closed-form editing of text-to-image diffusion models, as a batch job.

The public names are imported on first use, so that ``import fasttrace`` and ``fasttrace --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import zoo
    from .corruption import GaussianNoise, philox_normal
    from .edit import Edit, fit_edit, load_edit
    from .effects.effects import Effects
    from .engine.denoise.trace import DenoiserTrace, UNetTrace, trace_denoiser, trace_unet
    from .engine.text.trace import TextTrace, trace_logits, trace_text
    from .errors import FasttraceError
    from .patch import ZERO, Add, Noise, Patch
    from .pipeline import Condition, load_pipeline
    from .prompts import Prompt
    from .sites import Site, discover_sites, find_site, select_sites
    from .study.run import run
    from .study.study import Study

__version__ = "0.1.0"

_HOME = {
    "GaussianNoise": "corruption",
    "philox_normal": "corruption",
    "Edit": "edit",
    "fit_edit": "edit",
    "load_edit": "edit",
    "Effects": "effects.effects",
    "run": "study.run",
    "TextTrace": "engine.text.trace",
    "trace_text": "engine.text.trace",
    "trace_logits": "engine.text.trace",
    "DenoiserTrace": "engine.denoise.trace",
    "UNetTrace": "engine.denoise.trace",
    "trace_denoiser": "engine.denoise.trace",
    "trace_unet": "engine.denoise.trace",
    "FasttraceError": "errors",
    "ZERO": "patch",
    "Add": "patch",
    "Noise": "patch",
    "Patch": "patch",
    "Condition": "pipeline",
    "load_pipeline": "pipeline",
    "Prompt": "prompts",
    "Site": "sites",
    "discover_sites": "sites",
    "find_site": "sites",
    "select_sites": "sites",
    "Study": "study.study",
}

__all__ = [
    "ZERO",
    "Add",
    "Condition",
    "DenoiserTrace",
    "Edit",
    "Effects",
    "FasttraceError",
    "GaussianNoise",
    "Noise",
    "Patch",
    "Prompt",
    "Site",
    "Study",
    "TextTrace",
    "UNetTrace",
    "discover_sites",
    "find_site",
    "fit_edit",
    "load_edit",
    "load_pipeline",
    "philox_normal",
    "run",
    "select_sites",
    "trace_denoiser",
    "trace_logits",
    "trace_text",
    "trace_unet",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module(".zoo", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'fasttrace' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
