"""The packaged transformer: Stable Diffusion 3 in miniature, on ``emoji``'s captions, pictures and text states."""

from __future__ import annotations

from .model import load

__all__ = ["load"]
