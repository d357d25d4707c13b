"""ROME's causal tracing (Meng et al. 2022, "Locating and editing factual associations in GPT"), with its signatures.

The functions take what the originals take and return what they return; a sweep over (token, layer) is one packed pass
instead of one forward a cell. Noise is the original's: NumPy's ``RandomState(1)``, the same draw for every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.text.linear import on_packed
from ..engine.text.trace import encoder_path
from ..errors import BackendError
from ..models.text.families import word_embedding
from ..patch import Patch
from ..sites import part_sites
from .base import Backend, Sweep

State = tuple[int, str]
"""A token's index and a layer's name, as ROME writes them: ``(3, "transformer.h.5.mlp")``."""

Noise = float | Callable[[Tensor], Tensor]
"""A factor on standard draws, or a function of them ``[S, n, D]`` (`parse_noise` makes both)."""


@dataclass(frozen=True)
class Trace:
    """The arguments of `trace_many`, checked."""

    input_ids: Tensor
    attention_mask: Tensor | None
    states: Sequence[Sequence[State]]
    answers: Tensor
    noise: Tensor


class RomeBackend(Backend[Trace]):
    """Runs `Trace` requests; the functions of this module are its everyday form."""

    def sweep(self, request: Trace) -> Sweep:
        runs = [tuple(Patch(layer, [token]) for token, layer in states) for states in request.states]
        last = len(request.input_ids) - 1
        return Sweep(request.input_ids, runs, request.noise, attention_mask=request.attention_mask, position=last)

    def score(self, request: Trace, states: Tensor) -> Tensor:
        return self.probabilities(states, request.answers).mean(dim=0)


def trace_with_patch(
    model: Any,
    inp: Mapping[str, Tensor],
    states_to_patch: Sequence[State],
    answers_t: Tensor | int,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    trace_layers: Sequence[str] | None = None,
) -> Tensor:
    """Probability of the answers when some states of a corrupted run are restored.

    Args:
        model: a causal language model.
        inp: ``input_ids`` (and ``attention_mask``) ``[1 + S, T]``: one prompt repeated; row 0 is the clean run, the
            others are the noise samples.
        states_to_patch: (token, layer name) pairs to restore together; none gives the corrupted run. Beside what the
            original takes, ``"transformer.h.5.attn.heads.3"`` names a single head.
        answers_t: token ids whose probability is reported, of any shape.
        tokens_to_mix: first token to corrupt and the one after the last; ``None`` corrupts nothing.
        noise: factor on the draws, or a function of them.
        uniform_noise: uniform draws in (-1, 1) instead of normal ones.
        replace: noise takes the place of the embeddings instead of being added.
        trace_layers: refused; the original's way to return activations.

    Returns:
        Probabilities at the last token, averaged over the noise samples, in the shape of ``answers_t``.

    Raises:
        BackendError: prompts or masks that differ by row, ``tokens_to_mix`` outside the prompt, or ``trace_layers``.
    """
    if trace_layers is not None:
        raise BackendError("trace_layers is not supported: record activations with the original's nethook.TraceDict")
    cells = trace_many(model, inp, [states_to_patch], answers_t, tokens_to_mix, noise, uniform_noise, replace)
    return cells[0]


def trace_many(
    model: Any,
    inp: Mapping[str, Tensor],
    list_of_states_to_patch: Sequence[Sequence[State]],
    answers_t: Tensor | int,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    batch_size: int | None = None,
) -> Tensor:
    """`trace_with_patch` for many cells in packed passes: ``[N, *answers_t.shape]``; `Backend` says what a batch is."""
    answers = torch.as_tensor(answers_t, device=inp["input_ids"].device)
    ids, mask, samples = _one_prompt(inp)
    drawn = corruption_noise(model, ids, samples, tokens_to_mix, noise, uniform_noise, replace)
    request = Trace(ids, mask, list_of_states_to_patch, answers.reshape(-1), drawn)
    return RomeBackend(model, batch_size).run(request).reshape(len(list_of_states_to_patch), *answers.shape)


def corruption_noise(
    model: Any,
    input_ids: Tensor,
    samples: int,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise,
    uniform_noise: bool,
    replace: bool,
) -> Tensor:
    """ROME's noise as the engine takes it: ``[S, T, D]`` to add to the word embeddings, zero outside the span.

    Args:
        input_ids: the prompt, ``[T]``.
        samples: ``S``.
        tokens_to_mix, noise, uniform_noise, replace: as in `trace_with_patch`.

    Raises:
        BackendError: ``tokens_to_mix`` outside the prompt.
    """
    embedded = on_packed(word_embedding(model), input_ids)
    result = embedded.new_zeros(samples, *embedded.shape)
    if tokens_to_mix is None:
        return result
    begin, end = tokens_to_mix
    if not 0 <= begin <= end <= len(input_ids):
        raise BackendError(
            f"tokens_to_mix={tokens_to_mix}: expected the first token to corrupt and the one after the last, of "
            f"{len(input_ids)} tokens"
        )
    generator = np.random.RandomState(1)
    shape = (samples, end - begin, embedded.shape[1])
    draws = torch.from_numpy(generator.uniform(-1, 1, shape) if uniform_noise else generator.randn(*shape))
    scaled = noise(draws.to(embedded.device)) if callable(noise) else noise * draws.to(embedded.device)
    result[:, begin:end] = scaled.to(result)
    if replace:
        result[:, begin:end] -= embedded[begin:end]
    return result


def _one_prompt(inp: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, int]:
    ids, mask = inp["input_ids"], inp.get("attention_mask")
    if ids.ndim != 2 or ids.shape[0] < 2 or not bool((ids == ids[0]).all()):
        raise BackendError(
            f"input_ids of shape {list(ids.shape)}: expected one prompt repeated in 1 + S rows, as "
            "make_inputs([prompt] * (samples + 1)) gives; trace each prompt in a call of its own"
        )
    if mask is not None and not bool((mask == mask[0]).all()):
        raise BackendError("attention_mask differs by row: expected that of one prompt, repeated as its tokens are")
    if mask is not None and bool(mask.all()):
        mask = None
    return ids[0], None if mask is None else mask[0], ids.shape[0] - 1


def calculate_hidden_flow(
    mt: Any,
    prompt: str,
    subject: str,
    samples: int = 10,
    noise: Noise = 0.1,
    token_range: str | None = None,
    uniform_noise: bool = False,
    replace: bool = False,
    window: int = 10,
    kind: str | None = None,
    expect: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The whole (token, layer) sweep of one prompt.

    Args:
        mt: anything with ``.model`` and ``.tokenizer``, such as ROME's ``ModelAndTokenizer``.
        prompt: the text before the answer.
        subject: the words to corrupt.
        samples: noise samples.
        noise, uniform_noise, replace: as in `trace_with_patch`.
        token_range: ``None`` for every token, or ``"subject_last"``.
        window: layers restored together around each layer, for a ``kind``.
        kind: ``None`` for whole hidden states, ``"mlp"`` or ``"attn"``.
        expect: an answer; if the model gives another, nothing is traced.
        batch_size: cells that are held at once; by default as many as fit in a fixed budget of memory.

    Returns:
        ``scores`` [tokens, layers], ``low_score``, ``high_score``, ``input_ids``, ``input_tokens``, ``subject_range``,
        ``answer``, ``window``, ``correct_prediction``, ``kind``. As in the original, ``low_score`` ignores ``replace``.
    """
    if token_range not in (None, "subject_last"):
        raise BackendError(f'token_range={token_range!r}: expected None or "subject_last"')
    tokenizer, model = mt.tokenizer, mt.model
    ids = torch.tensor(tokenizer(prompt)["input_ids"], device=model.device)
    inp = {"input_ids": ids.repeat(samples + 1, 1)}
    with torch.no_grad():
        probabilities = torch.softmax(model(input_ids=ids[None]).logits[0, -1], dim=-1)
    high_score, answer_t = probabilities.max(dim=-1)
    answer = tokenizer.decode([answer_t])
    if expect is not None and answer.strip() != expect:
        return {"correct_prediction": False}
    span = find_token_range(tokenizer, ids, subject)
    tokens = [span[1] - 1] if token_range == "subject_last" else list(range(len(ids)))
    cells = _cells(model, tokens, kind, window)
    low_score = trace_with_patch(model, inp, [], answer_t, span, noise, uniform_noise).item()
    scores = trace_many(model, inp, cells, answer_t, span, noise, uniform_noise, replace, batch_size)
    return {
        "scores": scores.reshape(len(tokens), -1).cpu(),
        "low_score": low_score,
        "high_score": high_score,
        "input_ids": ids,
        "input_tokens": [tokenizer.decode([token]) for token in ids],
        "subject_range": span,
        "answer": answer,
        "window": window,
        "correct_prediction": True,
        "kind": kind or "",
    }


def _cells(model: Any, tokens: Sequence[int], kind: str | None, window: int) -> list[list[State]]:
    kinds = {None: "hidden", "mlp": "mlp", "attn": "self_attn"}
    if kind not in kinds:
        raise BackendError(f'kind={kind!r}: expected None, "mlp" or "attn"')
    layers = [encoder_path(site.name) for site in part_sites(model, "model") if site.kind == kinds[kind]]

    def restored(layer: int) -> list[str]:
        if kind is None:
            return [layers[layer]]
        return layers[max(0, layer - window // 2) : min(len(layers), layer - (-window // 2))]

    return [[(token, name) for name in restored(layer)] for token in tokens for layer in range(len(layers))]


def find_token_range(tokenizer: Any, token_array: Tensor, substring: str) -> tuple[int, int]:
    """First token of a substring and the one after its last, by decoding token by token, as ROME does.

    Raises:
        BackendError: the tokens do not spell it.
    """
    pieces = [tokenizer.decode([token]) for token in token_array]
    whole = "".join(pieces)
    start = whole.find(substring)
    if start < 0:
        raise BackendError(f"{substring!r} is not in {whole!r}: the subject must stand in the prompt as written")
    ends = np.cumsum([len(piece) for piece in pieces])
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, start + len(substring), side="left"))
    return first, last + 1


def parse_noise(text: str, embeddings: Tensor) -> tuple[Noise, bool]:
    """ROME's ``--noise_level`` grammar.

    ==========  ==============================================================================================
    ``"0.1"``   normal noise of that standard deviation
    ``"s3"``    normal noise of 3 standard deviations of all the numbers in ``embeddings``
    ``"u0.5"``  uniform noise in (-0.5, 0.5)
    ``"m"``     multivariate normal noise with the mean and covariance of ``embeddings``
    ``"t4"``    Student's t with 4 degrees of freedom and the same mean and covariance
    ==========  ==============================================================================================

    Args:
        text: the level.
        embeddings: embeddings ``[n, D]`` of the subjects' tokens (``s``) or of running text (``m``, ``t``).

    Returns:
        ``noise`` and ``uniform_noise``, as the functions of this module take them.
    """
    letter, number = (text[:1], text[1:]) if text[:1].isalpha() else ("", text)
    try:
        value = float(number) if number or letter != "m" else 0.0
    except ValueError:
        value = float("nan")
    if letter not in ("", "s", "u", "m", "t") or not value >= 0 or (letter == "t" and value <= 2):
        raise BackendError(
            f'noise level {text!r}: expected a number, "s3", "u0.5", "m", or "t4" with more than 2 degrees'
        )
    if letter in ("", "u"):
        return value, letter == "u"
    if letter == "s":
        return value * float(embeddings.std()), False
    return _matched(embeddings.double(), value if letter == "t" else None), False


def _matched(embeddings: Tensor, degrees: float | None) -> Callable[[Tensor], Tensor]:
    """Standard normal draws ``[S, n, D]`` to draws with the mean and covariance of ``embeddings``."""
    mean, covariance = embeddings.mean(dim=0), torch.cov(embeddings.T)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def transform(draws: Tensor) -> Tensor:
        normal = draws.double() @ root.to(draws.device)
        if degrees is not None:
            # t = normal / sqrt(chi2 / degrees) has covariance degrees / (degrees - 2) times that of the normal.
            chi2 = np.random.RandomState(2).chisquare(degrees, size=tuple(draws.shape[:-1]))
            normal = normal * torch.from_numpy(np.sqrt((degrees - 2) / chi2)).to(draws.device)[..., None]
        return mean.to(draws.device) + normal

    return transform
