"""A finished folder: its table and its record. Files are whole or not there: written elsewhere, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
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
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A hidden name beside ``path`` of this process alone; those of processes that were killed here are removed."""
    stem = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        pid = left.name.removeprefix(stem)
        if pid.isdecimal() and not _lives(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


def read_table(path: Path) -> pd.DataFrame:
    """Raises:
    StudyError: it cannot be read as a table.
    """
    try:
        return pd.read_parquet(path)
    except Exception as error:  # Arrow raises many types for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StudyError(f"{path} is damaged ({reason}): remove it and run the study again") from error


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
    return read_table(folder / TABLE), read_json(folder / RECORD)
