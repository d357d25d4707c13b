from .findings import Findings

__all__ = ["Findings"]
