"""What a borrowed machine lacks, in one folder: ``python -m bench.gpu.kit`` fills it, ``--here`` runs with it.

Such a machine has torch, Triton, transformers and ``nvcc``, but no network, no diffusers and nothing of this project
installed. Wheels travel in the ignored folder ``.kit``; they are unpacked there, not installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".kit"
LACKING = ("diffusers", "importlib_metadata", "zipp")
LIMIT_BYTES = 8 * 2**20


def fill(folder: Path = KIT) -> list[Path]:
    """Download the wheels that such a machine lacks, of the versions installed here, into ``folder``.

    Raises:
        SystemExit: they take more than ``LIMIT_BYTES``.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in LACKING]
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *wanted], check=True)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > LIMIT_BYTES:
        raise SystemExit(f"{folder}: {size / 2**20:.1f} MiB of wheels, more than {LIMIT_BYTES >> 20}: leave some out")
    return wheels


def unpacked(folder: Path = KIT) -> Path:
    """The wheels of ``folder`` as one importable folder, made once; an empty one where there are none."""
    wheels = sorted(folder.glob("*.whl"))
    names = "-".join("_".join(wheel.name.split("-")[:2]) for wheel in wheels)
    target = Path(tempfile.gettempdir()) / f"fasttrace-kit-{os.getuid()}-{names or 'empty'}"
    if not target.exists():
        scratch = tempfile.mkdtemp(dir=target.parent)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
        os.rename(scratch, target)
    return target


def environment(folder: Path = KIT) -> dict[str, str]:
    """Variables under which any Python imports ``fasttrace``, its kernels and the wheels from here, offline."""
    paths = [str(ROOT / "bench" / "gpu" / "site"), str(ROOT), str(unpacked(folder))]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    for made in fill():
        print(f"{made.stat().st_size / 2**20:6.2f} MiB  {made.relative_to(ROOT)}")
