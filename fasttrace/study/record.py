"""``study.json``: a study as plain data, with everything that is needed to repeat it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..sites import PARTS, Site

if TYPE_CHECKING:
    from .study import Study

FORMAT = 1
# Fields of a study that are JSON data as they are.
_PLAIN = (
    "protocol", "base", "source", "num_inference_steps", "guidance_scale", "negative_prompt", "eta", "branch",
    "windows", "scored_text", "preset",
)  # fmt: skip
NEEDED = (*_PLAIN, "format", "prompts", "seeds", "sites", "corruption", "sigma", "metrics", "model")
PROMPT_FIELDS = ("id", "attribute", "text", "subject", "span", "target", "seeds")
# What a record says beyond the study's own arguments.
RESULTING = ("model", "versions", "computed")
# What a record says about where it was made, without effect on what is made.
CIRCUMSTANCES = ("versions",)


def study_record(study: Study) -> dict[str, Any]:
    """A study as JSON data.

    Besides the study's own arguments, with the noise scale resolved (``sigma``) and the scheduler with its whole
    configuration: ``model`` (class, name, dtype, fingerprint of all weights) and ``versions``.
    """
    scheduler = study.traced_pipe.scheduler
    record = {
        "format": FORMAT,
        **{name: getattr(study, name) for name in _PLAIN},
        "prompts": [{name: getattr(prompt, name) for name in PROMPT_FIELDS} for prompt in study.prompts],
        "seeds": study.seeds,
        "sites": _site_record(study.sites),
        "positions": _listed(study.positions),
        "steps": _listed(study.steps),
        "sources": dict(study.sources),
        "corruption": dataclasses.asdict(study.corruption),
        "sigma": study.sigma,
        "metrics": [metric.name for metric in study.resolved_metrics],
        "scheduler": {"class": type(scheduler).__name__, "config": _config(scheduler)},
        "screening": study.screening,
        "model": model_record(study.pipe),
        "versions": _versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists, as they will be when read
    return plain


def model_record(pipe: Any) -> dict[str, str]:
    """Class, name, dtype and fingerprint of a pipeline."""
    return {
        "class": type(pipe).__name__,
        "name": str(getattr(pipe, "name_or_path", "") or ""),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(pipe),
    }


@torch.no_grad()
def fingerprint(pipe: Any) -> str:
    """A hash over names, shapes and every byte of the text encoders', UNet's and VAE's weights."""
    digest = hashlib.sha256()
    for part in (*PARTS, "vae"):
        module = getattr(pipe, part, None)
        if isinstance(module, nn.Module):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _site_record(sites: Any) -> Any:
    if isinstance(sites, Site):
        return sites.name
    if isinstance(sites, tuple):
        return {"together": [_site_record(one) for one in sites]}
    return sites if isinstance(sites, str) else [_site_record(one) for one in sites]


def _listed(value: Any) -> Any:
    """Ranges and tuples as lists, and numpy's integers as integers."""
    if value is None or isinstance(value, str | dict):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return [_listed(one) for one in value]


def _config(scheduler: Any) -> dict[str, Any]:
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=lambda value: value.tolist()))
    return plain


def _versions() -> dict[str, str]:
    from .. import __version__

    packages = ("torch", "diffusers", "transformers", "numpy")
    return {
        "fasttrace": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
