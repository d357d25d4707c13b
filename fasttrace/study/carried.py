"""What a pipeline carries beside its weights that decides its results.

Adapters and their scale, FreeU, hooks, attention processors, replaced methods, configurations and tokenizers: each a
short name, so that two records can be told apart and the difference be named.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from ..sites import PARTS
from .identity import UnknownError, identity

# What every module has, or gets without a change of results.
_COMMON = {
    *vars(nn.Module()), "config", "_internal_dict", "generation_config", "gradient_checkpointing", "peft_config",
    "_gradient_checkpointing_func", "_is_hf_initialized", "name_or_path", "_weight_conversions",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNKNOWN = "unknown: "


def carried(pipe: Any) -> dict[str, Any]:
    """Names of all that a pipeline carries, by part; a name that begins with ``unknown`` stands for no state."""
    record: dict[str, Any] = {"methods": _named({k: v for k, v in vars(pipe).items() if callable(v) and _loose(v)})}
    for part in (*PARTS, "vae"):
        module = getattr(pipe, part, None)
        if isinstance(module, nn.Module):
            record[part] = _module(module)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipe, name, None) is not None:
            record[name] = _tokenizer(getattr(pipe, name))
    return record


def unknown(record: Any, place: str = "") -> str | None:
    """The first thing in a record that could not be named: where it stands and of what type it is."""
    if isinstance(record, dict):
        found = (unknown(value, f"{place}.{name}" if place else str(name)) for name, value in record.items())
        return next((one for one in found if one), None)
    is_unknown = isinstance(record, str) and record.startswith(_UNKNOWN)
    return f"{place} ({record.removeprefix(_UNKNOWN)})" if is_unknown else None


def name_of(value: Any) -> str:
    """`identity`, or a name that says what has none."""
    try:
        return identity(value)
    except UnknownError as error:
        return f"{_UNKNOWN}{error}"


def _named(values: dict[str, Any]) -> str | None:
    return name_of(values) if values else None


def _module(module: nn.Module) -> dict[str, str | None]:
    hooks, processors, attributes = {}, {}, {}
    for place, one in module.named_modules():
        for kind in _HOOKS:
            if getattr(one, kind):
                hooks[f"{place} {kind}"] = list(getattr(one, kind).values())
        attributes[place] = f"{type(one).__module__}.{type(one).__qualname__}"
        for name, value in vars(one).items():
            if name == "processor":
                processors[place] = value
            elif name not in _COMMON and value is not None:
                attributes[f"{place} {name}"] = value
    config: Any = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:24],
        "hooks": _named(hooks),
        "processors": _named(processors),
        "attributes": _named({k: v for k, v in attributes.items() if not isinstance(v, nn.Module)}),
    }


def _tokenizer(tokenizer: Any) -> str:
    """Vocabulary, merges, and all else that a tokenizer does; padding and truncation are given at every call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        merges = getattr(tokenizer, "bpe_ranks", {})
        state = {"vocab": tokenizer.get_vocab(), "merges": sorted(map(str, merges.items()))}
    state |= {"class": type(tokenizer).__name__, "length": tokenizer.model_max_length}
    state |= {"special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]


def _loose(value: Any) -> bool:
    """Functions set on a pipeline itself; its parts are callable too, and are named by themselves."""
    return hasattr(value, "__code__") or hasattr(value, "__func__")
