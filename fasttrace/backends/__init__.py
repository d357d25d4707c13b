"""Other tracing libraries call the engine through these; see the README beside this file.

Nothing of another library is imported here: ``fasttrace.backends.pyvene`` and its like do that when they are used.
"""

from .base import Backend, Sweep

__all__ = ["Backend", "Sweep"]
