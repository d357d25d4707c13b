"""Tracing a text encoder or a language model, by the fast engine or the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, NumericsError
from ...patch import PatchSet
from ..oracle.text import trace_text_oracle
from ..requests.text import TextRequest, Tokens, encoder_path, text_request
from ..values import nan_rows

__all__ = [
    "TextPart",
    "TextRequest",
    "TextTrace",
    "encoder_path",
    "run_text_request",
    "text_request",
    "trace_logits",
    "trace_text",
    "trace_text_parts",
]


@dataclass(frozen=True)
class TextTrace:
    """What a text trace returns.

    Attributes:
        clean: ``[T, D]`` (``[D]`` if pooled or at one position, ``[A]`` for logits).
        corrupted: ``[T, D]``, or ``[S, T, D]`` where the noise has a sample dimension.
        restored: ``[N, T, D]``, or ``[S, N, T, D]``: one per run, in the order of the patches.
    """

    clean: Tensor
    corrupted: Tensor
    restored: Tensor


@dataclass(frozen=True)
class TextPart:
    """Some finished runs of one noise sample.

    Attributes:
        sample: number of the noise sample.
        runs: numbers of the runs ``[n]``.
        restored: their outputs ``[n, T, D]`` (``[n, D]`` if pooled or at one position).
    """

    sample: int
    runs: Tensor
    restored: Tensor


def trace_text(
    encoder: Any,
    input_ids: Tokens,
    patches: Iterable[PatchSet],
    noise: Tensor,
    *,
    base: str = "corrupted",
    sources: Mapping[str, Tokens] | None = None,
    output: str = "last",
    position: int | None = None,
    attention_mask: Tokens | None = None,
    engine: str = "fast",
    clip_skip: int | None = None,
    dtype: torch.dtype | None = None,
    max_rows: int | None = None,
    attention: str | None = None,
    out: Tensor | None = None,
) -> TextTrace:
    """Run a text encoder clean, corrupted, and once for each element of ``patches``.

    Args:
        encoder: ``CLIPTextModel``, ``CLIPTextModelWithProjection``, ``T5EncoderModel``, or a language model of the
            GPT-2, Llama, Qwen2 or Qwen3 family, whose hidden states are returned.
        input_ids: token ids ``[T]``.
        patches: one run each: a `Patch`, or a tuple of them, applied in order.
        noise: ``[T, D]`` or ``[S, T, D]``, added to the word embeddings of the corrupted run.
        base: ``"corrupted"`` or ``"clean"``: the run that is patched.
        sources: token ids ``[T]`` of other prompts, by the name that patches use; they run without noise.
        output: ``"last"`` (after the final layer norm), ``"penultimate"`` (the last layer's input, as SDXL reads), or
            ``"pooled"`` (at the end of text; projected where the encoder has a projection).
        position: the only token whose state is returned, so that results drop ``T``; nothing is computed that this
            token does not depend on. ``None`` for all tokens.
        attention_mask: ``[T]``, as in transformers.
        engine: ``"fast"``, or ``"oracle"``: plain hooks, one run at a time. The fast engine calls projections, norms
            and MLPs as modules, with their hooks and adapters; hooks on whole layers and attentions do not fire.
        clip_skip: number of last layers to leave out, as in diffusers' pipelines.
        dtype: run a copy of the encoder in this dtype, such as ``torch.bfloat16``; the results have it too.
        max_rows: most packed tokens that pass through the model together; one needs about ``(10 D + F) x itemsize``
            bytes, where ``F`` is the MLP's width. Results do not depend on it.
        attention: how the fast engine attends: ``"grouped"`` (torch's own, once for all runs that start at a
            token), ``"ragged"`` (the op whose Triton kernel is compiled, not measured; causal encoders), or ``None``
            for the one that was quickest on such tensors. Results do not depend on it.
        out: where to write ``restored``, in its shape and dtype.

    Raises:
        PatchError: noise, ids or tensor sources of the wrong shape, positions out of range, an unknown source or base.
        SiteError: a site that the encoder does not have.
        ModelError: an encoder, output or engine that is not supported; an encoder whose dropout is active.
        NumericsError: a run that is not finite, by number.
    """
    request = text_request(
        encoder, input_ids, patches, noise, base=base, sources=sources, output=output, attention_mask=attention_mask,
        clip_skip=clip_skip, dtype=dtype, max_rows=max_rows, attention=attention, out=out, position=position,
    )  # fmt: skip
    return run_text_request(request, engine)


def trace_logits(
    model: Any,
    input_ids: Tokens,
    patches: Iterable[PatchSet],
    noise: Tensor,
    answers: Tokens,
    *,
    position: int | None = None,
    base: str = "corrupted",
    sources: Mapping[str, Tokens] | None = None,
    attention_mask: Tokens | None = None,
    engine: str = "fast",
    dtype: torch.dtype | None = None,
    max_rows: int | None = None,
) -> TextTrace:
    """Run a language model as `trace_text` does, and return the logits of some answers at one position.

    Nothing of size runs x tokens x vocabulary is made: of the head only the answers' rows are applied, at the position
    alone, and there alone the last layer's MLP runs.

    Args:
        answers: token ids ``[A]``.
        position: the token whose prediction is read; by default the last that ``attention_mask`` does not hide.

    Returns:
        ``clean`` ``[A]``, ``corrupted`` ``[A]`` or ``[S, A]``, ``restored`` ``[N, A]`` or ``[S, N, A]``.

    Raises:
        As `trace_text`, and ModelError for a model without a language-modelling head.
    """
    request = text_request(
        model, input_ids, patches, noise, base=base, sources=sources, output="logits", attention_mask=attention_mask,
        dtype=dtype, max_rows=max_rows, answers=answers, position=position,
    )  # fmt: skip
    return run_text_request(request, engine)


def trace_text_parts(request: TextRequest) -> Iterator[TextPart]:
    """The restored runs of a checked request as they are finished, where ``N x T x D`` would not fit in memory.

    Every run of every noise sample comes once, in the order that suits the engine.

    Raises:
        NumericsError: a run that is not finite, by number.
    """
    from .packed import PackedText

    with torch.no_grad():
        packed = PackedText(request)
        for sample, noise in enumerate(request.noise):
            for runs, restored in packed.sample(noise)[1]:
                _check_finite(restored, runs)
                yield TextPart(sample, runs, restored)


def run_text_request(request: TextRequest, engine: str = "fast") -> TextTrace:
    """Run a checked request; see `trace_text`."""
    with torch.no_grad():
        clean, corrupted, restored = _engine(engine)(request)
    for name, states in (("clean", clean), ("corrupted", corrupted)):
        if not bool(torch.isfinite(states).all()):
            raise NumericsError(
                f"the {name} text run is not finite in {states.dtype}: use float32 or bfloat16 for the text encoder, "
                "or check its weights and the noise"
            )
    runs = torch.arange(len(request.runs)).repeat(len(request.noise))
    _check_finite(restored.flatten(0, 1), runs)
    return TextTrace(clean, corrupted, restored) if request.sampled else TextTrace(clean, corrupted[0], restored[0])


def _engine(name: str) -> Callable[[TextRequest], tuple[Tensor, Tensor, Tensor]]:
    if name == "oracle":
        return trace_text_oracle
    if name == "fast":
        from .packed import trace_text_packed

        return trace_text_packed
    raise ModelError(f'engine={name!r}: expected "fast" or "oracle"')


def _check_finite(restored: Tensor, runs: Tensor) -> None:
    # A sum is one pass; where it is not finite, a value or the sum itself overflowed. Only float16 needs a wider one,
    # for which torch makes a copy.
    wide = torch.float32 if restored.dtype == torch.float16 else None
    if bool(torch.isfinite(restored.sum(dtype=wide))):
        return
    bad = sorted({int(runs[row]) for row in nan_rows(restored)})
    if bad:
        raise NumericsError(
            f"{len(bad)} text runs are not finite (first: run {bad[0]}) in {restored.dtype}: use float32 or bfloat16 "
            "for the text encoder, or check the source tensors"
        )
