"""The checked request of a text trace: everything that can be refused is refused here, before any compute."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, PatchError, SiteError
from ...models.text.families import canonical_path, family_of, pooled_token, word_embedding
from ...patch import Add, Patch, PatchSet, as_runs
from ...sites import TEXT_PARTS, Site, head_sites, part_sites, unknown_site
from ..values import given_value

OUTPUTS = ("last", "penultimate", "pooled")
BASES = ("corrupted", "clean")
ATTENTIONS = ("grouped", "ragged")

Tokens = Tensor | Sequence[int]


@dataclass(frozen=True)
class TextRequest:
    """A text trace that has been checked: what both engines read.

    Attributes:
        encoder: the user's encoder, or its copy in another dtype.
        ids: ``[T]`` on the encoder's device.
        noise: ``[S, T, D]`` in the encoder's dtype, added to the word embeddings.
        runs: patches of each run; positions are indices or ``None``.
        sites: the encoder's sites and heads by path within it (``encoder.layers.0.mlp``).
        base: the run that is patched.
        sources: token ids ``[T]`` of further source prompts, by name.
        output: what is returned: one of `OUTPUTS`, or ``"logits"``.
        attention_mask: ``[T]``, 0 for padding that must not be read, or ``None``.
        depth: number of layers that run.
        column: the only token that is returned, or ``None`` for all.
        answers: ids ``[A]`` of the logits that are returned, or ``None``.
        max_rows: packed tokens that pass through the model together, or ``None`` for the device's own.
        attention: one of `ATTENTIONS`, or ``None`` for the quickest.
        out: where the restored runs go, ``[S, N, T, D]``, or ``None``.
        sampled: whether the noise came with a sample dimension, and results go back with one.
    """

    encoder: Any
    ids: Tensor
    noise: Tensor
    runs: list[tuple[Patch, ...]]
    sites: dict[str, Site]
    base: str
    sources: dict[str, Tensor]
    output: str
    attention_mask: Tensor | None
    depth: int
    column: int | None
    answers: Tensor | None
    max_rows: int | None
    attention: str | None
    out: Tensor | None
    sampled: bool

    def site_of(self, patch: Patch) -> Site:
        return self.sites[encoder_path(patch.site)]


def encoder_path(name: str) -> str:
    """A site's name without the part: its path within the encoder."""
    head, _, rest = name.partition(".")
    return canonical_path(rest if head in TEXT_PARTS else name)


def text_request(
    encoder: Any,
    input_ids: Tokens,
    patches: Iterable[PatchSet],
    noise: Tensor,
    *,
    base: str = "corrupted",
    sources: Mapping[str, Tokens] | None = None,
    output: str = "last",
    attention_mask: Tokens | None = None,
    clip_skip: int | None = None,
    dtype: torch.dtype | None = None,
    max_rows: int | None = None,
    attention: str | None = None,
    out: Tensor | None = None,
    answers: Tokens | None = None,
    position: int | None = None,
) -> TextRequest:
    """Check the arguments of `trace_text` or `trace_logits`, which say what is raised."""
    encoder = _checked_encoder(encoder, dtype)
    every = [*part_sites(encoder, "text_encoder"), *head_sites(encoder, "text_encoder")]
    sites = {encoder_path(site.name): site for site in every}
    if output not in (*OUTPUTS, "logits"):
        raise ModelError(f"output={output!r}: expected one of {', '.join(OUTPUTS)}")
    if base not in BASES:
        raise PatchError(f"base={base!r}: expected one of {', '.join(BASES)}")
    if max_rows is not None and max_rows < 1:
        raise PatchError(f"max_rows={max_rows}: expected at least 1 packed token")
    embedding = word_embedding(encoder).weight
    ids = _checked_ids("input_ids", input_ids, embedding)
    length, width = ids.shape[0], embedding.shape[1]
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise PatchError(f"input_ids has {length} tokens: the encoder takes at most {limit}")
    if not isinstance(noise, Tensor) or noise.ndim not in (2, 3) or noise.shape[-2:] != (length, width):
        shape = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise PatchError(f"noise has shape {shape}: expected [{length}, {width}] or [S, {length}, {width}]")
    named = {name: _checked_ids(f"sources[{name!r}]", value, embedding) for name, value in (sources or {}).items()}
    for name, value in named.items():
        if name in ("clean", "corrupted"):
            raise PatchError(f"sources has the name {name!r}, which means this trace's own run: choose another")
        if value.shape != (length,):
            raise PatchError(f"sources[{name!r}] has shape {list(value.shape)}: expected [{length}], as input_ids")
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=ids.device).long()
    if mask is not None and mask.shape != (length,):
        raise PatchError(f"attention_mask has shape {list(mask.shape)}: expected [{length}]")
    runs = as_runs(patches)
    for patch in (patch for run in runs for patch in run):
        _check_patch(patch, encoder, sites, length, width, named)
    column = _column(encoder, ids, mask, output, position)
    samples = noise.to(embedding) if noise.ndim == 3 else noise.to(embedding)[None]
    return TextRequest(
        encoder,
        ids,
        samples,
        runs,
        sites,
        base,
        named,
        output,
        mask,
        _depth(sites, output, clip_skip),
        column,
        None if output != "logits" else _checked_answers(encoder, answers),
        max_rows,
        _checked_attention(encoder, attention),
        _checked_out(out, column, (*noise.shape[:-2], len(runs), length, width), embedding),
        noise.ndim == 3,
    )


def _checked_encoder(encoder: Any, dtype: torch.dtype | None) -> Any:
    family_of(encoder)
    for path, module in encoder.named_modules():
        if module.training and _drops(module):
            raise ModelError(
                f"dropout is active in {type(encoder).__name__}"
                f"{f': {path} is in training mode' if path else ''}: call .eval() first"
            )
    if dtype is None or dtype == word_embedding(encoder).weight.dtype:
        return encoder
    return copy.deepcopy(encoder).to(dtype)


def _drops(module: nn.Module) -> bool:
    """Whether a module in training mode drops numbers; attentions keep the rate as a number of their own."""
    rates = [getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout")]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _checked_ids(name: str, ids: Tokens, embedding: Tensor) -> Tensor:
    tokens = torch.as_tensor(ids, device=embedding.device).long()
    if tokens.ndim != 1 or tokens.shape[0] == 0:
        raise PatchError(f"{name} has shape {list(tokens.shape)}: expected [T], one prompt")
    if int(tokens.min()) < 0 or int(tokens.max()) >= embedding.shape[0]:
        raise PatchError(f"{name} goes from {int(tokens.min())} to {int(tokens.max())}: the vocabulary has 0 to "
                         f"{embedding.shape[0] - 1}")  # fmt: skip
    return tokens


def _check_patch(
    patch: Patch, encoder: Any, sites: dict[str, Site], length: int, width: int, named: Mapping[str, Tensor]
) -> None:
    if encoder_path(patch.site) not in sites:
        layers = sum(site.kind == "hidden" for site in sites.values())
        unknown = unknown_site(patch.site, [site.name for site in sites.values()])
        raise SiteError(f"{type(encoder).__name__} has {layers} layers; {unknown}")
    if patch.branch != "cond":
        raise PatchError(f"{patch.site}: branch={patch.branch!r}, but a text encoder has no guidance branches")
    patch.within(length, None, {"clean", "corrupted", *named})
    value = patch.source.value if isinstance(patch.source, Add) else patch.source
    if isinstance(value, Tensor):
        channels = sites[encoder_path(patch.site)].channels
        given_value(patch, value, length, width if channels is None else channels.stop - channels.start, None)


def _depth(sites: dict[str, Site], output: str, clip_skip: int | None) -> int:
    layers = sum(site.kind == "hidden" for site in sites.values())
    skipped = clip_skip or 0
    if skipped and output == "pooled":
        raise ModelError(
            f"clip_skip={clip_skip} with the pooled output: pooling reads the last layer; use clip_skip=None"
        )
    depth = layers - skipped - (output == "penultimate")
    if skipped < 0 or depth < 1:
        raise ModelError(f"clip_skip={clip_skip}: expected 0 to {layers - 1 - (output == 'penultimate')}")
    return depth


def _column(encoder: Any, ids: Tensor, mask: Tensor | None, output: str, position: int | None) -> int | None:
    if output == "pooled":
        if position is not None:
            raise PatchError(f'position={position}: the pooled output is read at the end of text; use output="last"')
        return pooled_token(encoder, ids)
    if position is None:
        if output != "logits":
            return None
        return ids.shape[0] - 1 if mask is None or not mask.any() else int(mask.nonzero()[-1])
    if not 0 <= position < ids.shape[0]:
        raise PatchError(f"position={position}: expected 0 to {ids.shape[0] - 1}")
    return position


def _checked_answers(model: Any, answers: Tokens | None) -> Tensor:
    if getattr(model, "lm_head", None) is None:
        raise ModelError(f"{type(model).__name__} has no language-modelling head: expected a model with an lm_head")
    return _checked_ids("answers", answers if answers is not None else (), model.lm_head.weight)


def _checked_attention(encoder: Any, attention: str | None) -> str | None:
    if attention is not None and attention not in ATTENTIONS:
        raise ModelError(f"attention={attention!r}: expected one of {', '.join(ATTENTIONS)}")
    if attention == "ragged" and not _is_plainly_causal(encoder):
        raise ModelError(
            f'attention="ragged" is causal and adds nothing to the scores, unlike that of {type(encoder).__name__}: '
            'use "grouped"'
        )
    return attention


def _is_plainly_causal(encoder: Any) -> bool:
    family = family_of(encoder)
    return family.causal and family.relative is None


def _checked_out(out: Tensor | None, column: int | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    if out is None:
        return None
    if column is not None:
        raise PatchError("out is for states of all tokens: outputs of one token are small, so leave it out")
    if out.shape != shape or out.dtype != like.dtype or out.device != like.device:
        raise PatchError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}: expected {like.dtype} {list(shape)} on "
            f"{like.device}"
        )
    return out if len(shape) == 4 else out[None]
