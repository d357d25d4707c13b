"""``make bench``: the suites one after another, each in a process of its own.

    python -m bench [--full] [SUITE ...]

A suite is a module ``bench_<name>.py`` whose main takes the names of its parts; ``QUICK`` lists what runs without
``--full``, chosen to end within five minutes on two cores. What the quick form measures is shown and not recorded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from . import record

SUITES = ("text", "unet", "unet_floor", "pictures", "edit", "backends", "planner", "scaling")
QUICK: dict[str, list[str]] = {
    "text": ["float32", "quick"],
    "unet": ["hooks"],
    "pictures": [],
    "edit": ["error", "quickfix"],
    "backends": ["nnsight"],
}


def main(arguments: Sequence[str]) -> int:
    full = "--full" in arguments
    chosen = [name for name in arguments if not name.startswith("-")] or list(SUITES if full else QUICK)
    unknown = [name for name in chosen if name not in SUITES]
    if unknown:
        print(f"no suite {unknown[0]!r}: expected one of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    environment = os.environ | ({} if full else {record.SWITCH: "0"})
    failed = []
    for name in chosen:
        command = [sys.executable, "-m", f"bench.bench_{name}", *([] if full else QUICK.get(name, []))]
        print(f"\n== {name}: {' '.join(['python', *command[1:]])}", flush=True)
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
