"""On ``PYTHONPATH`` this makes ``fasttrace.kernels`` importable from the tree, which otherwise only an install does.

Python imports a module of this name when it starts, in every process.
"""

import importlib.util
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[3] / "kernels"


class _KernelsOfTheTree:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fasttrace.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
        )


sys.meta_path.insert(0, _KernelsOfTheTree)
