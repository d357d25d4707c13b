"""What a callable or an object does, as a name: its code and the state that its code reads, hashed.

Two equal names mean equal results; a change of code, of a default, of a closure or of a global that is read gives
another. An object with an attribute ``version`` (text or a number) is named by its class and that alone: its author
says when it changes.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, range, type(...), enum.Enum)
_NAMED = (
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    np.ufunc,
)


class UnknownError(Exception):
    """A value that no name can be given to."""


def identity(value: Any) -> str:
    """A name for what ``value`` is and does, the same in every process.

    Raises:
        UnknownError: it holds something whose state cannot be read (a file, a generator, a compiled object).
    """
    return _Digest(value).name


class _Digest:
    def __init__(self, value: Any) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # values too, so that no id is used twice
        self._package = str(getattr(value, "__module__", None) or type(value).__module__).partition(".")[0]
        self._add(value)
        self.name = self._hash.hexdigest()[:24]

    def _say(self, *words: Any) -> None:
        self._hash.update(repr(words).encode("utf-8", "surrogatepass"))

    def _add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, value)
        if id(value) in self._seen:  # a function that calls itself, or a value that is held twice
            return self._say("again", self._seen[id(value)][0])
        self._seen[id(value)] = len(self._seen), value
        version = None if isinstance(value, type | types.ModuleType) else getattr(value, "version", None)
        if isinstance(version, str | int | float):
            return self._say("version", _name(value), version)
        if isinstance(value, Tensor | np.ndarray):
            return self._add_array(value)
        if isinstance(value, Mapping):
            return self._add_items(type(value).__name__, sorted(value.items(), key=lambda item: repr(item[0])))
        if isinstance(value, set | frozenset):
            return self._add_items("set", sorted(value, key=repr))
        if isinstance(value, list | tuple):
            return self._add_items(type(value).__name__, value)
        return self._add_code(value)

    def _add_code(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_items("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._add_items("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.CodeType):
            self._say(value.co_code, value.co_names, value.co_varnames, value.co_freevars)
            self._add_items("constants", value.co_consts)
        elif isinstance(value, _NAMED):
            self._say(_name(value))
        elif isinstance(value, type):
            self._say(_name(value))
            if self._own(value):
                self._add_items("methods", [one for one in vars(value).values() if isinstance(one, types.FunctionType)])
        elif hasattr(value, "__dict__"):
            self._add(type(value))
            self._add_items("state", [(name, _without_ids(name, one)) for name, one in sorted(vars(value).items())])
        else:
            raise UnknownError(_name(type(value)))

    def _add_function(self, function: types.FunctionType) -> None:
        self._say(_name(function))
        if not self._own(function):  # of a library: its name stands for it
            return
        self._add(function.__code__)
        self._add_items("defaults", (function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                held = None
            self._add(held)
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._say(name)
                self._add(function.__globals__[name])

    def _add_items(self, kind: str, items: Iterable[Any]) -> None:
        self._say(kind)
        for item in items:
            self._add(item)
        self._say("end")

    def _add_array(self, value: Tensor | np.ndarray[Any, Any]) -> None:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise UnknownError("an array of objects")
            self._say("array", value.shape, str(value.dtype), value.tobytes())
            return
        flat = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._say("tensor", tuple(value.shape), str(value.dtype), flat.numpy().tobytes())

    def _own(self, value: Any) -> bool:
        """Whether it is of the package that the whole value comes from, and so may be edited with it."""
        return str(value.__module__).partition(".")[0] == self._package


def _names(code: types.CodeType) -> list[str]:
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return sorted({*code.co_names, *inner})


def _without_ids(name: str, value: Any) -> Any:
    """Hooks without the numbers that torch gives them, which count up within a process."""
    return list(value.values()) if "hooks" in name and isinstance(value, Mapping) else value


def _name(value: Any) -> str:
    kind = value if hasattr(value, "__name__") else type(value)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind.__name__)}"
