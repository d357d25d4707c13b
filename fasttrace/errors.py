"""Every exception that fasttrace raises on purpose: each message names the value, what was expected, and the remedy."""

from __future__ import annotations


class FasttraceError(Exception):
    """Base of all errors that a caller can act on; the shell prints it as one line."""


class SiteError(FasttraceError, LookupError):
    """A site name or pattern that matches nothing in the pipeline."""


class PromptError(FasttraceError, ValueError):
    """A prompt whose subject is absent, cut off by the token limit, or not on token boundaries."""


class PatchError(FasttraceError, ValueError):
    """A patch that cannot be applied: positions or steps out of range, an unknown source, a wrong shape."""


class StudyError(FasttraceError, ValueError):
    """A study, prompt file or plan with a field that is missing, unknown or contradictory."""


class ModelError(FasttraceError, ValueError):
    """A pipeline, encoder, scheduler or model folder that is unsupported or does not fit the request."""


class NumericsError(FasttraceError, ArithmeticError):
    """A run that turned NaN or infinite; names the runs."""


class EditError(FasttraceError, ValueError):
    """A closed-form edit that cannot be fitted, loaded or applied."""


class MetricError(FasttraceError, ValueError):
    """A metric that is unknown, or that the study's protocol cannot serve."""


class KernelError(FasttraceError, RuntimeError):
    """A kernel called with shapes, dtypes or devices outside what it supports."""


class BackendError(FasttraceError, ValueError):
    """A request from another tracing library that the engine cannot serve; names the library's own way."""
