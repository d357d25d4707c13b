from .effects import Effects

__all__ = ["Effects"]
