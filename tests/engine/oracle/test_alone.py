"""The oracle imports nothing that the engines which it judges compute with."""

from __future__ import annotations

import subprocess
import sys

# Sites are found by reading models' descriptions, which are loaded with them; the oracle itself imports none of those,
# as a contract on imports says.
JUDGED = ("fasttrace.engine.text", "fasttrace.engine.denoise", "fasttrace.ops", "fasttrace.kernels")


def test_importing_the_oracle_loads_no_engine() -> None:
    code = (
        "import importlib, pkgutil, sys, fasttrace.engine.oracle as oracle\n"
        "for part in pkgutil.iter_modules(oracle.__path__):\n"
        "    importlib.import_module(f'{oracle.__name__}.{part.name}')\n"
        f"print('engines:', sorted(name for name in sys.modules if name.startswith({JUDGED})))\n"
        "print('oracle:', sorted(name for name in sys.modules if name.startswith('fasttrace.engine.oracle.')))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "engines: []" in output
    assert "oracle: ['fasttrace.engine.oracle.denoise', 'fasttrace.engine.oracle.text']" in output
