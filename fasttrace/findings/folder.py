"""A finished folder: its table and its record. Files are whole or not there: written elsewhere, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import StudyError

TABLE, RECORD = "effects.parquet", "study.json"
PARTIAL = "partial"  # what a run keeps there until it is finished


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` when the block ends, and is gone if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises:
    StudyError: no such file, or not JSON (with the line).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def save_effects(folder: Path, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Write ``effects.parquet`` and ``study.json``: both or neither."""
    with replacing(folder / TABLE) as new_table, replacing(folder / RECORD) as new_record:
        table.to_parquet(new_table, index=False)
        new_record.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_effects(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and the record of a finished run.

    Raises:
        StudyError: the folder has no finished run; says whether one was begun.
    """
    if not (folder / TABLE).is_file():
        begun = " (one was begun there: run it again to finish it)" if (folder / PARTIAL).is_dir() else ""
        raise StudyError(f"no {TABLE} in {str(folder)!r}: expected the folder of a finished run{begun}")
    return pd.read_parquet(folder / TABLE), read_json(folder / RECORD)
