from .study import Study

__all__ = ["Study"]
