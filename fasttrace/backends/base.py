"""What another tracing library has to say for its requests to run on the engine: the one interface of all backends."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..engine.text.on_ops import linear_calls
from ..engine.text.trace import trace_text
from ..errors import BackendError
from ..models.text.families import word_embedding
from ..patch import PatchSet
from ..sites import Site, head_sites, part_sites

Request = TypeVar("Request")

# What a backend holds at once beside the model, the unpatched runs and what it returns.
RUNS_BUDGET = 768 * 2**20
# The C library gives larger blocks back to the system, and to get fresh ones takes as long as half of the product.
LOGITS_BUDGET = 32 * 2**20


@dataclass(frozen=True)
class Sweep:
    """A library's request in the engine's words: see `fasttrace.trace_text`, whose arguments these are.

    Attributes:
        input_ids: the prompt, ``[T]``.
        runs: one patched run each.
        noise: ``[S, T, D]``, added to the word embeddings of the corrupted run; ``None`` for none.
        base: the run that is patched.
        sources: other prompts ``[T]`` by the name that patches use.
        attention_mask: ``[T]`` or ``None``.
        position: the only token whose state is scored, or ``None`` for all; nothing is computed for the others that it
            does not depend on.
    """

    input_ids: Tensor
    runs: Sequence[PatchSet]
    noise: Tensor | None = None
    base: str = "corrupted"
    sources: Mapping[str, Tensor] = field(default_factory=dict)
    attention_mask: Tensor | None = None
    position: int | None = None


def tokens_read(positions: Sequence[int] | None, length: int) -> list[int] | None:
    """Which tokens of a prompt are read, counted from its beginning; ``None`` for all.

    Raises:
        BackendError: none at all, or one that the prompt does not have.
    """
    if positions is None:
        return None
    chosen = [int(position) for position in positions]
    if not chosen or not all(-length <= position < length for position in chosen):
        raise BackendError(
            f"logit_positions={chosen}: expected positions of a prompt of {length} tokens, from {-length} to "
            f"{length - 1}, or None for all"
        )
    return [position % length for position in chosen]


class Backend(abc.ABC, Generic[Request]):
    """Serves one library's requests on one model of transformers.

    A subclass translates: `sweep` from the library's request to runs, `score` from final states to what the library
    would have returned for each run. `run` does the rest, some runs at a time.

    Args:
        model: a causal language model or a text encoder that `fasttrace.trace_text` supports; left unchanged.
        batch_size: runs that are held at once; by default as many as fit in `RUNS_BUDGET`. One takes at most
            ``T x (10 D + F)`` numbers, where ``F`` is the MLP's width, and four times its ``S x T x D`` final states
            (without ``T`` where one token is read). Results do not depend on it.

    Raises:
        BackendError: ``batch_size`` is less than one.
    """

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise BackendError(f"batch_size={batch_size}: expected at least 1")
        self.model = model
        self.batch_size = batch_size

    @abc.abstractmethod
    def sweep(self, request: Request) -> Sweep:
        """The request in the engine's words.

        Raises:
            BackendError: something in it has no counterpart; the message names the library's own way.
        """

    @abc.abstractmethod
    def score(self, request: Request, states: Tensor) -> Tensor:
        """What the library reports of some runs.

        Args:
            states: hidden states after the final norm, ``[S, n, T, D]``, of ``n`` runs; ``[S, n, D]`` where the sweep
                names one position.

        Returns:
            ``[n, ...]``, one row a run.
        """

    @torch.no_grad()
    def run(self, request: Request) -> Tensor:
        """Scores of all runs of a request, ``[N, ...]``, in the request's order."""
        sweep = self.sweep(request)
        scores = [self.score(request, states) for states in self._states(sweep)]
        return torch.cat(scores) if scores else torch.empty(0)

    def logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of the language-modelling head.

        Args:
            states: ``[..., D]``, after the final norm.
            tokens: ids to score, ``[k]``; ``None`` for the whole vocabulary.

        Returns:
            ``[..., k]``.

        Raises:
            BackendError: the model has no such head.
        """
        head = self._head()
        if tokens is None:
            flat = states.reshape(-1, states.shape[-1])
            return linear_calls(flat, len(flat))(head, flat).reshape(*states.shape[:-1], head.weight.shape[0])
        bias = None if head.bias is None else head.bias[tokens]
        return torch.nn.functional.linear(states, head.weight[tokens], bias)

    def logits_of_each(self, states: Tensor) -> Iterator[Tensor]:
        """`logits` of the whole vocabulary, by elements of the first dimension.

        Args:
            states: ``[N, ..., D]``, after the final norm. Products are of as many elements as `LOGITS_BUDGET` holds.

        Yields:
            ``[..., vocabulary]``, ``N`` times.
        """
        if not len(states):
            return
        rows = states[0].numel() // states.shape[-1]
        for part in self._logits_in_parts(states.reshape(-1, states.shape[-1]), rows):
            yield from part.reshape(-1, *states.shape[1:-1], part.shape[-1])

    def probabilities(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Softmax probabilities of chosen tokens, without ever holding all rows' logits.

        Args:
            states: ``[..., D]``, after the final norm.
            tokens: ids, ``[k]``.

        Returns:
            ``[..., k]``.
        """
        flat = states.reshape(-1, states.shape[-1])
        parts = [torch.softmax(part, dim=-1)[:, tokens] for part in self._logits_in_parts(flat)]
        return torch.cat(parts).reshape(*states.shape[:-1], len(tokens))

    def _logits_in_parts(self, states: Tensor, together: int = 1) -> Iterator[Tensor]:
        """Logits ``[n, vocabulary]`` of states ``[R, D]``, ``n`` a multiple of ``together`` that fits in the budget."""
        head, call = self._head(), linear_calls(states, len(states))
        held = together * head.weight.shape[0] * states.element_size()
        for part in torch.split(states, together * max(1, LOGITS_BUDGET // held)):
            yield call(head, part)

    def _head(self) -> Any:
        head = self.model.get_output_embeddings()
        if head is None:
            raise BackendError(
                f"{type(self.model).__name__} has no language-modelling head: load a ...ForCausalLM model"
            )
        return head

    @cached_property
    def sites(self) -> list[Site]:
        """Every site of the model, heads included."""
        return [*part_sites(self.model, "model"), *head_sites(self.model, "model")]

    @property
    def has_head(self) -> bool:
        """Whether there are logits."""
        return self.model.get_output_embeddings() is not None

    @property
    def embedding_width(self) -> int:
        """Width of the word embeddings, ``D``."""
        embedding: Any = word_embedding(self.model)
        return int(embedding.weight.shape[1])

    def runs_at_once(self, tokens: int, states: int) -> int:
        """``batch_size``, or the runs that fit in `RUNS_BUDGET`.

        Args:
            tokens: length of the prompt, ``T``.
            states: final states that are held of one run.
        """
        if self.batch_size is not None:
            return self.batch_size
        config, width = self.model.config, self.embedding_width
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        numbers = tokens * (10 * width + inner) + 4 * states * width
        return int(max(1, RUNS_BUDGET // (numbers * word_embedding(self.model).weight.element_size())))

    def _states(self, sweep: Sweep) -> Iterator[Tensor]:
        """Final states ``[S, n, T, D]`` (without ``T`` at one position) of some runs after others."""
        noise = sweep.noise
        if noise is None:
            noise = torch.zeros(1, len(sweep.input_ids), self.embedding_width)
        length, samples = len(sweep.input_ids), len(noise)
        size = self.runs_at_once(length, samples * (length if sweep.position is None else 1))
        for start in range(0, len(sweep.runs), size):
            yield trace_text(
                self.model,
                sweep.input_ids,
                sweep.runs[start : start + size],
                noise,
                base=sweep.base,
                sources=sweep.sources,
                attention_mask=sweep.attention_mask,
                position=sweep.position,
            ).restored
