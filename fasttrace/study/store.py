"""What a run that is under way keeps, so that it can go on after an interruption.

A finished folder has ``effects.parquet``, ``study.json``, and ``pictures/`` where pictures were made. Until then its
``partial/`` holds ``manifest.json`` (what is being run) and one pair of files for each finished group of runs, named by
a hash of the settings and the group, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from ..findings.folder import PARTIAL, read_json, read_table, replacing, write_json

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MANIFEST = "manifest.json"


def content_hash(data: Any) -> str:
    """A name for JSON data: equal data, equal name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


class Shards:
    """Finished groups of a run that is under way.

    Args:
        folder: of the run.
        settings: everything that decides the results, as JSON data. Groups that were finished under other settings are
            never taken over.
        overwrite: start afresh where the folder holds a run under other settings.

    Raises:
        StudyError: the folder holds a run under other settings; names what differs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self._folder = folder / PARTIAL
        if overwrite:
            self.clear()
        manifest = self._folder / MANIFEST
        if manifest.is_file():
            check_same(read_json(manifest), settings, folder)
        else:
            write_json(manifest, settings)

    def rows(self, key: str) -> pd.DataFrame | None:
        """The rows of a group, if it is finished."""
        table = self._folder / f"{key}.parquet"
        return read_table(table) if table.is_file() else None

    def latents(self, key: str) -> Tensor | None:
        """The latents of a finished group, if it has any."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._folder / f"{key}.safetensors"
        try:
            return load_file(file)["latents"] if file.is_file() else None
        except (SafetensorError, KeyError) as error:
            raise StudyError(f"{file} is damaged ({error}): remove it and its .parquet, and run again") from error

    def put(self, key: str, rows: pd.DataFrame, latents: Tensor | None) -> None:
        """Keep a finished group; its rows come last, and stand for both."""
        from safetensors.torch import save_file

        if latents is not None:
            with replacing(self._folder / f"{key}.safetensors") as temporary:
                save_file({"latents": latents.contiguous()}, temporary)
        with replacing(self._folder / f"{key}.parquet") as temporary:
            rows.to_parquet(temporary, index=False)

    def clear(self) -> None:
        """Remove everything that is partial."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def clear_if_empty(self, and_folder: bool) -> None:
        """Leave nothing behind where no group was finished; nor the run's folder, if it is new."""
        if not any(self._folder.glob("*.parquet")):
            self.clear()
            if and_folder:
                with contextlib.suppress(OSError):
                    self._folder.parent.rmdir()


def check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two studies in one folder.

    Raises:
        StudyError: the first difference.
    """
    found = _difference(dict(there), dict(wanted), "")
    if found is not None:
        name, old, new = found
        raise StudyError(
            f"{str(folder)!r} holds another study: its {name} is {_short(old)}, this one's is {_short(new)}; choose "
            "another folder, or overwrite=True"
        )


def _difference(there: Any, wanted: Any, name: str) -> tuple[str, Any, Any] | None:
    """Where two settings first differ, and both values."""
    if there == wanted:
        return None
    if not (isinstance(there, dict) and isinstance(wanted, dict)):
        return name, there, wanted
    keys = dict.fromkeys([*wanted, *there])
    found = (_difference(there.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
    return next(one for one in found if one is not None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
