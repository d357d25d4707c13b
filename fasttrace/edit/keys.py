"""Keys: what reaches a matrix at chosen tokens of chosen sentences, by a forward that goes no further than that."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.hooks import uncompiled
from ..engine.values import first
from ..errors import EditError
from ..models.text.families import is_causal
from ..prompts import Prompt, TokenizedPrompt
from .concepts import Pair, Positions, aligned_positions
from .matrices import select_matrices, tokenizer_of

_BATCH = 64


@dataclass(frozen=True)
class Tokens:
    """Sentences as one text encoder reads them, and the token positions that are wanted of each."""

    ids: list[tuple[int, ...]]
    positions: list[list[int]]

    @property
    def count(self) -> int:
        return sum(map(len, self.positions))


@dataclass(frozen=True)
class Request:
    """Which tokens give the keys of an edit: old and new ones in corresponding order, and those to preserve."""

    old: Tokens
    new: Tokens
    keep: Tokens


def tokens_of(pipe: Any, part: str, pairs: Sequence[Pair], preserve: Sequence[Prompt], rule: Positions) -> Request:
    """Token positions of an edit in one text encoder.

    Raises:
        PromptError: a subject that is cut off by the token limit.
        EditError: spans that do not align.
    """
    tokenizer = tokenizer_of(pipe, part)
    known: dict[Prompt, TokenizedPrompt] = {}

    def tokenized(prompt: Prompt) -> TokenizedPrompt:
        if prompt not in known:
            known[prompt] = prompt.tokenize(tokenizer)
        return known[prompt]

    aligned = [aligned_positions(pair, tokenized(pair.old), tokenized(pair.new), rule) for pair in pairs]
    kept = [tokenized(prompt) for prompt in preserve]
    return Request(
        Tokens([tokenized(pair.old).ids for pair in pairs], [old for old, _ in aligned]),
        Tokens([tokenized(pair.new).ids for pair in pairs], [new for _, new in aligned]),
        Tokens([t.ids for t in kept], [_preserved(t, rule) for t in kept]),
    )


def _preserved(tokens: TokenizedPrompt, rule: Positions) -> list[int]:
    last = tokens.role("subject_last")
    if rule == "subject_last":
        return list(last)
    return list(range(last[0] if rule == "subject_last_to_end" else 0, len(tokens.ids)))


class _Reached(Exception):
    """Everything that was wanted has been seen: the forward stops here."""


def capture(
    encoder: nn.Module, ids: Tensor, inputs: Mapping[str, nn.Module], outputs: Mapping[str, nn.Module] | None = None
) -> dict[str, Tensor]:
    """Inputs and outputs of some modules in one forward, which stops as soon as the last of them has been seen.

    Args:
        encoder: text encoder.
        ids: ``[B, T]``.
        inputs: modules whose first argument is wanted, by name.
        outputs: modules whose value is wanted, by name.

    Returns:
        ``{name: [B, T, D]}``.

    Raises:
        EditError: a module that the forward does not call.
    """
    outputs = outputs or {}
    wanted = len(inputs) + len(outputs)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = value.detach()
        if len(seen) == wanted:
            raise _Reached

    def before(name: str) -> Any:
        return lambda module, args: keep(name, args[0])

    def after(name: str) -> Any:
        return lambda module, args, output: keep(name, first(output))

    handles = [module.register_forward_pre_hook(before(name)) for name, module in inputs.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in outputs.items()]
    try:
        with torch.no_grad(), uncompiled(encoder), contextlib.suppress(_Reached):
            encoder(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted({*inputs, *outputs} - set(seen))
    if missing:
        raise EditError(f"{type(encoder).__name__} does not call {missing[0]} in its forward: choose another site")
    return seen


def text_columns(
    encoder: nn.Module,
    tokens: Tokens,
    inputs: Mapping[str, nn.Module],
    outputs: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Columns ``{name: [D, r]}``: one for each wanted token, sentence by sentence.

    A causal encoder's tokens do not see what follows, so its sentences are cut after the last token that is wanted.
    """
    names = [*inputs, *(outputs or {})]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    causal = is_causal(encoder)
    device = encoder.get_input_embeddings().weight.device  # type: ignore[operator]
    for start in range(0, len(tokens.ids), _BATCH):
        ids, positions = tokens.ids[start : start + _BATCH], tokens.positions[start : start + _BATCH]
        length = 1 + max((max(p, default=0) for p in positions), default=0) if causal else len(ids[0])
        seen = capture(encoder, torch.tensor([row[:length] for row in ids], device=device), inputs, outputs)
        rows = torch.tensor([row for row, p in enumerate(positions) for _ in p], device=device)
        where = torch.tensor([i for p in positions for i in p], device=device)
        for name in names:
            parts[name].append(seen[name][rows, where])
    widths = {name: _width(module) for name, module in inputs.items()}
    return {name: torch.cat(parts[name]).T if parts[name] else torch.empty(widths.get(name, 0), 0) for name in names}


def _width(module: nn.Module) -> int:
    return int(module.weight.shape[1])  # type: ignore[index]


def state_columns(pipe: Any, prompts: Sequence[str], positions: Sequence[Sequence[int]]) -> Tensor:
    """Columns ``[D, r]`` of the text states that cross-attention reads, SDXL's two encoders side by side."""
    parts = []
    for start in range(0, len(prompts), _BATCH):
        states = text_states(pipe, prompts[start : start + _BATCH])
        wanted = positions[start : start + _BATCH]
        rows = [row for row, p in enumerate(wanted) for _ in p]
        parts.append(states[rows, [i for p in wanted for i in p]])
    return torch.cat(parts).T if parts else torch.empty(int(pipe.unet.config.cross_attention_dim), 0)


@torch.no_grad()
def text_states(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """``[B, T, D]``: the text states of some prompts, as the pipeline itself encodes them."""
    states: Tensor = pipe.encode_prompt(
        list(prompts), device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return states


def key_gram(pipe: Any, prompts: Sequence[str], matrix: str) -> Tensor:
    """``C [d, d]`` in float64: the sum of ``k kᵀ`` over every token, padding included, of prompts to preserve.

    Args:
        pipe: the pipeline.
        prompts: sentences whose keys should keep their values.
        matrix: a site or projection whose inputs are meant; all cross-attention shares one.

    Raises:
        EditError: prompts that are one text, not a list of them.
        SiteError: a name that matches no site.
    """
    if isinstance(prompts, str):
        raise EditError(f"prompts={prompts!r}: expected a list of prompts")
    chosen = select_matrices(pipe, matrix)[0]
    width = chosen.weight.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(prompts), _BATCH):
        batch = list(prompts[start : start + _BATCH])
        if chosen.is_text:
            tokenizer, encoder = tokenizer_of(pipe, chosen.part), getattr(pipe, chosen.part)
            limit = tokenizer.model_max_length
            encoded = tokenizer(batch, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
            ids = encoded.input_ids.to(chosen.weight.device)
            keys = capture(encoder, ids, {chosen.name: chosen.module})[chosen.name]
        else:
            keys = text_states(pipe, batch)
        flat = keys.flatten(0, 1).to("cpu", torch.float64)
        total += flat.T @ flat
    return total
