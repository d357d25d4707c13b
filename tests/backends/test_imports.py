"""A backend brings its library only where it is used."""

from __future__ import annotations

import subprocess
import sys

RIVALS = ("baukit", "nnsight", "pyvene", "transformer_lens")


def test_importing_backends_imports_no_rival() -> None:
    code = (
        "import sys, fasttrace.backends, fasttrace.backends.rome, fasttrace.backends.tracedict, "
        "fasttrace.backends.pyvene, fasttrace.backends.transformer_lens; "
        f"print('rivals:', [name for name in {RIVALS} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "rivals: []" in output
