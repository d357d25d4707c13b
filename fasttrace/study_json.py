"""``study.json``: a study as plain data, with everything that is needed to repeat it, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .corruption import GaussianNoise
from .errors import StudyError
from .prompts import Prompt
from .sites import PARTS, Site
from .store import RECORD, read_json

if TYPE_CHECKING:
    from .study import Study

# Fields of a study that are JSON data as they are.
_PLAIN = (
    "protocol", "base", "source", "num_inference_steps", "guidance_scale", "negative_prompt", "eta", "branch",
    "windows", "scored_text", "preset",
)  # fmt: skip
_NEEDED = ("format", "prompts", "seeds", "sites", "corruption", "sigma", "metrics", "model")
_PROMPT_FIELDS = ("id", "attribute", "text", "subject", "span", "target", "seeds")
# What a record says beyond the study's own arguments.
_RESULTING = ("model", "versions", "computed")
# What a record says about where it was made, without effect on what is made.
CIRCUMSTANCES = ("versions",)


def study_record(study: Study) -> dict[str, Any]:
    """A study as JSON data.

    Besides the study's own arguments, with the noise scale resolved (``sigma``) and the scheduler with its whole
    configuration: ``model`` (class, name, dtype, fingerprint of all weights) and ``versions``.
    """
    scheduler = study.traced_pipe.scheduler
    record = {
        "format": 1,
        **{name: getattr(study, name) for name in _PLAIN},
        "prompts": [{name: getattr(prompt, name) for name in _PROMPT_FIELDS} for prompt in study.prompts],
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


def read_study(path: Path, pipe: Any, overrides: Mapping[str, Any]) -> Study:
    """See `Study.from_json`."""
    from .study import Study

    path = path / RECORD if path.is_dir() else path
    record = read_json(path)
    known = {field.name for field in dataclasses.fields(Study)} | {"format", *_RESULTING}
    if not isinstance(record, dict):
        raise StudyError(f"{path} holds a {type(record).__name__}: expected the object that a study writes")
    unknown = sorted(set(record) - known)
    missing = sorted({*_PLAIN, *_NEEDED} - set(record))
    if unknown or missing:
        problem = f"unknown field {unknown[0]!r}" if unknown else f"no field {missing[0]!r}"
        raise StudyError(f"{path}: {problem}; expected {', '.join(sorted(known - {'pipe'}))}")
    if record["format"] != 1:
        raise StudyError(f"{path}: format {record['format']!r}; this version reads format 1")
    model = model_record(pipe)
    if record["model"].get("fingerprint") != model["fingerprint"]:
        was = {name: record["model"].get(name) for name in ("class", "name", "dtype")}
        raise StudyError(
            f"{path} was made with another model, {was}; this one is {model} with other weights: load the same weights "
            "in the same dtype"
        )
    settings = {name: value for name, value in record.items() if name not in ("format", *_RESULTING)}
    settings["prompts"] = [_prompt(path, index, entry) for index, entry in enumerate(record["prompts"])]
    settings["corruption"] = _built(path, "corruption", GaussianNoise, record["corruption"])
    settings["sites"] = _sites(record["sites"])
    settings["scheduler"] = _scheduler(path, record.get("scheduler"))
    try:
        return Study(pipe, **{**settings, **overrides})
    except TypeError as error:
        raise StudyError(f"{path}: {error}") from error


def _site_record(sites: Any) -> Any:
    if isinstance(sites, Site):
        return sites.name
    if isinstance(sites, tuple):
        return {"together": [_site_record(one) for one in sites]}
    return sites if isinstance(sites, str) else [_site_record(one) for one in sites]


def _sites(record: Any) -> Any:
    if isinstance(record, dict):
        return tuple(record["together"])
    return record if isinstance(record, str) else [_sites(one) for one in record]


def _listed(value: Any) -> Any:
    """Ranges and tuples as lists."""
    if value is None or isinstance(value, str | int | dict):
        return value
    return [_listed(one) for one in value]


def _prompt(path: Path, index: int, entry: Any) -> Prompt:
    if not isinstance(entry, dict) or set(entry) - set(_PROMPT_FIELDS):
        raise StudyError(f"{path}: prompts[{index}] is {entry!r}; expected the fields {', '.join(_PROMPT_FIELDS)}")
    tuples = {name: tuple(entry[name]) for name in ("span", "seeds") if entry.get(name) is not None}
    return _built(path, f"prompts[{index}]", Prompt, {**entry, **tuples})


def _built(path: Path, name: str, kind: Any, entry: Any) -> Any:
    try:
        return kind(**entry)
    except TypeError as error:
        raise StudyError(f"{path}: {name}: {error}") from error


def _config(scheduler: Any) -> dict[str, Any]:
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=lambda value: value.tolist()))
    return plain


def _scheduler(path: Path, record: Any) -> Any:
    import diffusers

    if record is None:
        return None
    name = str(record.get("class"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise StudyError(f"{path}: scheduler {name!r} is not in diffusers {diffusers.__version__}")
    return kind.from_config(record["config"])


def _versions() -> dict[str, str]:
    from . import __version__

    packages = ("torch", "diffusers", "transformers", "numpy")
    return {
        "fasttrace": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
