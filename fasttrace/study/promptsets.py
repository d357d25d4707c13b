"""Prompt sets: JSONL files of prompts with their subjects, packaged ones by name, and filters on what they scored.

One object a line:

=================  ========  ===================================================================================
field              needed    meaning
=================  ========  ===================================================================================
``prompt``         yes       the caption; ``text`` says the same
``subject``        yes       the words that are corrupted, as they stand in the caption
``id``             no        name in tables, different for every line; the caption if not given
``attribute``      no        what the subject expresses: ``object`` (if not given), ``style``, ``color``, ...
``span``           no        characters ``[start, stop]`` of the subject, where it stands there more than once
``target_prompt``  no        a caption to interchange with or to edit towards; ``target`` says the same
``seeds``          no        seeds of the latents, where they differ from the study's
=================  ========  ===================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import PromptError, StudyError
from ..prompts import Prompt

NEEDED = ("prompt", "subject")
OTHER_NAMES = {"text": "prompt", "target": "target_prompt"}  # as `Prompt` calls them
FIELDS = ("id", "attribute", "prompt", "subject", "span", "target_prompt", "seeds")


def prompt_sets() -> list[str]:
    """Names of the packaged prompt sets."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".jsonl"))


def load_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file, or of a packaged set by name (see `prompt_sets`).

    Raises:
        StudyError: no such file or set, or a line with a field that is missing, unknown or wrong; names file, line and
            field.
    """
    path = Path(source).expanduser()
    if isinstance(source, str) and source in prompt_sets():
        return parse_prompts((_folder() / f"{source}.jsonl").read_text(encoding="utf-8").split("\n"), source)
    try:
        # Not splitlines: a JSON string may hold the other characters that end a line there, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8 text: expected JSONL, one object a line") from error
    except OSError as error:
        raise StudyError(
            f"no prompt file {str(source)!r} ({error.strerror}); packaged sets are {', '.join(prompt_sets())}"
        ) from error
    return parse_prompts(lines, str(path))


def parse_prompts(lines: Iterable[str], name: str) -> tuple[Prompt, ...]:
    """Prompts from JSONL lines; empty lines are passed over.

    Args:
        lines: of the file.
        name: of the file, for errors.
    """
    prompts: dict[str, Prompt] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse_line(line, f"{name}, line {number}")
        if prompt.id in prompts:
            raise StudyError(
                f"{name}, line {number}: id {prompt.id!r} is that of line {places[prompt.id]} too: give each its own"
            )
        prompts[prompt.id], places[prompt.id] = prompt, number
    if not prompts:
        raise StudyError(f"{name} has no prompts: expected one JSON object a line")
    return tuple(prompts.values())


def write_prompts(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as JSONL, so that `load_prompts` gives them back."""
    from ..findings.folder import replacing

    lines = []
    for prompt in prompts:
        entry = {
            "id": prompt.id,
            "attribute": prompt.attribute,
            "prompt": prompt.text,
            "subject": prompt.subject,
            "span": prompt.span,
            "target_prompt": prompt.target,
            "seeds": prompt.seeds,
        }
        given = {field: value for field, value in entry.items() if value is not None}
        lines.append(json.dumps(given, ensure_ascii=False))
    with replacing(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _folder() -> Any:
    return resources.files("fasttrace") / "data"


def _parse_line(line: str, place: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise StudyError(f"{place}: not JSON ({error.msg} at character {error.colno})") from error
    if not isinstance(entry, dict):
        raise StudyError(f"{place}: expected an object with {', '.join(NEEDED)}; found {type(entry).__name__}")
    for other, field in OTHER_NAMES.items():
        if other in entry and field in entry:
            raise StudyError(f"{place}: fields {field!r} and {other!r} are two names of one thing: give one of them")
    entry = {OTHER_NAMES.get(field, field): value for field, value in entry.items()}
    problem = next(_problems(entry), None)
    if problem is not None:
        raise StudyError(f"{place}: {problem}")
    try:
        return Prompt(
            entry["prompt"],
            entry["subject"],
            attribute=entry.get("attribute") or Prompt.attribute,
            span=None if entry.get("span") is None else (entry["span"][0], entry["span"][1]),
            target=entry.get("target_prompt"),
            id=entry.get("id") or "",
            seeds=None if entry.get("seeds") is None else tuple(entry["seeds"]),
        )
    except PromptError as error:
        raise StudyError(f"{place}: {error}") from error


def _problems(entry: dict[str, Any]) -> Iterator[str]:
    for field in entry:
        if field not in FIELDS:
            yield f"unknown field {field!r}; expected {', '.join(FIELDS)}"
    for field in NEEDED:
        if field not in entry:
            yield f"no field {field!r}; needed are {', '.join(NEEDED)}"
    for field in (*NEEDED, "id", "attribute", "target_prompt"):
        value = entry.get(field)
        if not (isinstance(value, str) and value.strip()) and not (value is None and field not in NEEDED):
            yield f"field {field!r} is {value!r}: expected text"
    span, seeds = entry.get("span"), entry.get("seeds")
    if span is not None and not (isinstance(span, list) and len(span) == 2 and all(map(_is_index, span))):
        yield f"field 'span' is {span!r}: expected two whole numbers, [start, stop]"
    if seeds is not None:
        good = isinstance(seeds, list) and bool(seeds) and all(map(_is_index, seeds)) and len(set(seeds)) == len(seeds)
        if not good:
            yield f"field 'seeds' is {seeds!r}: expected a list of different whole numbers >= 0"


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
