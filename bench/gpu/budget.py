"""Running commands within a time that is given once, for all of them: what runs over is ended, with what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Budget:
    """Seconds from now, and a log of everything that was said.

    Args:
        seconds: all of it; infinite on a machine of one's own.
        log: file that receives every line, or ``None``.
    """

    seconds: float
    log: Path | None = None
    started: float = field(default_factory=time.time)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def until(self) -> float:
        """When it ends, as ``time.time()`` counts."""
        return self.started + self.seconds

    @property
    def left(self) -> float:
        return max(0.0, self.until - time.time())

    def say(self, line: str) -> None:
        """Print a line, and log it."""
        with self._lock:
            print(line, flush=True)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(line + "\n")

    def python(
        self,
        *arguments: str,
        at_most: float = float("inf"),
        environment: Mapping[str, str] | None = None,
        heard: Callable[[str], object] | None = None,
    ) -> int | None:
        """Run this interpreter with arguments; every line of its output goes to ``heard``, by default to ``say``.

        Returns:
            Its exit status, or ``None`` if its time ran out: the smaller of ``at_most`` and what is left.
        """
        seconds = min(at_most, self.left)
        if seconds <= 0:
            return None
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
        timer.start()
        try:
            for line in process.stdout or ():
                (heard or self.say)(line.rstrip("\n"))
            status = process.wait()
        finally:
            timer.cancel()
        return None if late.is_set() else status
