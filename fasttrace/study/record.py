"""``study.json``: a study as plain data, with everything that is needed to repeat it, and read back.

When it is read every field is checked, and named with its line where it is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import nn

from ..corruption import GaussianNoise
from ..errors import FasttraceError, MetricError, PatchError, PromptError, SiteError, StudyError
from ..findings.folder import RECORD, read_json
from ..prompts import Prompt
from ..sites import PARTS, Site
from .carried import carried, name_of
from .settings import Settings

Made = TypeVar("Made")

FORMAT = 1
# Fields of a study that are JSON data as they are.
_PLAIN = (
    "protocol", "base", "source", "num_inference_steps", "guidance_scale", "negative_prompt", "eta", "branch",
    "windows", "scored_text", "preset",
)  # fmt: skip
NEEDED = (*_PLAIN, "format", "prompts", "seeds", "sites", "corruption", "sigma", "metrics", "model")
PROMPT_FIELDS = ("id", "attribute", "text", "subject", "span", "target", "seeds")
# What a record says beyond the study's own arguments.
RESULTING = ("model", "carried", "callables", "versions", "computed")

# Where an error comes from whose message does not begin with the name of a field.
_FIELD_OF = {SiteError: "sites", MetricError: "metrics", PatchError: "corruption", PromptError: "prompts"}


def study_record(study: Settings) -> dict[str, Any]:
    """A study as JSON data.

    Besides the study's own arguments, with the noise scale resolved (``sigma``) and the scheduler with its whole
    configuration: ``model`` (class, name, dtype, fingerprint of all weights), ``carried`` (all that the pipeline has
    beside its weights and that decides its results), ``callables`` (metrics that are callables, by their code) and
    ``versions``.
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
        "carried": carried(study.pipe),
        "callables": {
            metric.name: name_of(given)
            for metric, given in zip(study.resolved_metrics, study.metrics, strict=True)
            if not isinstance(given, str)
        },
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
    packages = ("fasttrace", "torch", "diffusers", "transformers", "numpy")
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def read_study(path: Path, pipe: Any, overrides: Mapping[str, Any], kind: Callable[..., Made]) -> Made:
    """What ``kind`` makes of a pipeline and the recorded settings; see `fasttrace.study.study.Study.from_json`."""
    path = path / RECORD if path.is_dir() else path
    record = read_json(path)
    reader = _Reader(path, record)
    reader.check_fields()
    model, recorded = model_record(pipe), record["model"]
    if not isinstance(recorded, dict) or recorded.get("fingerprint") != model["fingerprint"]:
        reader.fail(
            "model",
            f"the study was made with another model, {recorded}; this one is {model}: load the same weights in the "
            "same dtype",
        )
    settings = {name: value for name, value in record.items() if name not in ("format", *RESULTING)}
    settings["prompts"] = reader.prompts()
    settings["corruption"] = reader.built("corruption", GaussianNoise, record["corruption"])
    settings["sites"] = reader.built("sites", _sites, {"record": record["sites"]})
    settings["scheduler"] = reader.scheduler()
    try:
        return kind(pipe, **{**settings, **overrides})
    except FasttraceError as error:
        named = re.match(r"\w+", str(error))
        field = _FIELD_OF.get(type(error)) or (named.group() if named else "")
        raise type(error)(f"{reader.place(field)}: {error}") from error
    except TypeError as error:
        raise StudyError(f"{path}: {error}") from error


class _Reader:
    """A record and where its fields stand."""

    def __init__(self, path: Path, record: Any) -> None:
        self._path, self._record = path, record
        self._lines = field_lines(path.read_text(encoding="utf-8"))

    def place(self, field: str) -> str:
        """File, and line where the field is there."""
        line = self._lines.get(field, self._lines.get(field.partition("[")[0]))
        return str(self._path) if line is None else f"{self._path}, line {line}"

    def fail(self, field: str, problem: str) -> NoReturn:
        raise StudyError(f"{self.place(field)}: {problem}")

    def check_fields(self) -> None:
        record = self._record
        known = {field.name for field in dataclasses.fields(Settings) if field.name != "pipe"} | {"format", *RESULTING}
        if not isinstance(record, dict):
            self.fail("", f"holds a {type(record).__name__}: expected the object that a study writes")
        for name in record:
            if name not in known:
                self.fail(name, f"unknown field {name!r}; expected {', '.join(sorted(known))}")
        for name in NEEDED:
            if name not in record:
                self.fail("", f"no field {name!r}; needed are {', '.join(NEEDED)}")
        if record["format"] != FORMAT:
            self.fail("format", f"format {record['format']!r}; this version reads format {FORMAT}")

    def built(self, field: str, kind: Callable[..., Any], entry: Any) -> Any:
        """What a field describes."""
        if not isinstance(entry, dict):
            self.fail(field, f"{field.partition('[')[0]} has {entry!r}: expected an object")
        try:
            return kind(**entry)
        except (TypeError, KeyError, FasttraceError) as error:
            raise StudyError(f"{self.place(field)}: {field}: {error}") from error

    def prompts(self) -> list[Prompt]:
        entries = self._record["prompts"]
        if not isinstance(entries, list):
            self.fail("prompts", f"prompts is {entries!r}: expected a list")
        prompts = []
        for index, entry in enumerate(entries):
            field = f"prompts[{index}]"
            unknown = sorted(set(entry) - set(PROMPT_FIELDS)) if isinstance(entry, dict) else []
            if unknown:
                self.fail(field, f"{field} has the unknown field {unknown[0]!r}; expected {', '.join(PROMPT_FIELDS)}")
            prompts.append(self.built(field, _prompt, entry))
        return prompts

    def scheduler(self) -> Any:
        """The scheduler that is described, or ``None`` for the pipeline's own."""
        import diffusers

        entry = self._record.get("scheduler")
        if entry is None:
            return None
        name = str(entry.get("class")) if isinstance(entry, dict) else str(entry)
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if kind is None:
            self.fail("scheduler", f"scheduler {name!r} is not in diffusers {diffusers.__version__}")
        return self.built("scheduler", kind.from_config, {"config": entry.get("config")})


def field_lines(text: str) -> dict[str, int]:
    """Lines of a JSON object's own fields, and of the objects in their lists as ``field[0]``, ``field[1]``, ..."""
    lines: dict[str, int] = {}
    depth, line, field, count = 0, 1, "", 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}\[\]\n]', text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token in "{[":
            if token == "{" and depth == 2:
                lines.setdefault(f"{field}[{count}]", line)
                count += 1
            depth += 1
        elif token in "}]":
            depth -= 1
        elif match.group(1) is not None and depth == 1:
            field, count = token[1 : token.rindex('"')], 0
            lines.setdefault(field, line)
    return lines


def _prompt(**entry: Any) -> Prompt:
    tuples = {name: tuple(entry[name]) for name in ("span", "seeds") if entry.get(name) is not None}
    return Prompt(**{**entry, **tuples})


def _sites(record: Any) -> Any:
    if isinstance(record, dict):
        return tuple(record["together"])
    return record if isinstance(record, str) else [_sites(one) for one in record]
