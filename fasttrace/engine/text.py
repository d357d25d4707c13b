"""Tracing a text encoder: the checked request, and the choice of engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ModelError, NumericsError, PatchError, SiteError
from ..patch import Patch, PatchSet, as_runs
from ..sites import TEXT_PARTS, Site, canonical_path, part_sites
from .decoder import SUPPORTED, is_supported, word_embedding
from .values import nan_rows

Output = Literal["last", "penultimate", "pooled"]
OUTPUTS = ("last", "penultimate", "pooled")
BASES = ("corrupted", "clean")


@dataclass(frozen=True)
class TextTrace:
    """What a text trace returns.

    Attributes:
        clean: ``[T, D]`` (``[D]`` if pooled).
        corrupted: ``[T, D]``, or ``[S, T, D]`` where the noise has a sample dimension.
        restored: ``[N, T, D]``, or ``[S, N, T, D]``: one per run, in the order of the patches.
    """

    clean: Tensor
    corrupted: Tensor
    restored: Tensor


@dataclass(frozen=True)
class TextRequest:
    """A text trace that has been checked: what both engines read.

    Attributes:
        encoder: the user's encoder.
        ids: ``[T]`` on the encoder's device.
        noise: ``[S, T, D]`` in the encoder's dtype, added to the word embeddings.
        runs: patches of each run; positions are indices or ``None``.
        sites: the encoder's sites by path within it (``encoder.layers.0.mlp``).
        base: the run that is patched.
        sources: token ids ``[T]`` of further source prompts, by name.
        output: what is returned.
        attention_mask: ``[T]``, 0 for padding that must not be read, or ``None``.
        depth: number of layers that run.
        column: the only token that is returned, or ``None`` for all.
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

    def site_of(self, patch: Patch) -> Site:
        return self.sites[encoder_path(patch.site)]


def encoder_path(name: str) -> str:
    """A site's name without the part: its path within the encoder."""
    head, _, rest = name.partition(".")
    return canonical_path(rest if head in TEXT_PARTS else name)


def trace_text(
    encoder: Any,
    input_ids: Tensor | Sequence[int],
    patches: Iterable[PatchSet],
    noise: Tensor,
    *,
    base: str = "corrupted",
    sources: Mapping[str, Tensor | Sequence[int]] | None = None,
    output: str = "last",
    attention_mask: Tensor | Sequence[int] | None = None,
    engine: str = "fast",
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
        attention_mask: ``[T]``, as in transformers.
        engine: ``"fast"``, or ``"oracle"``: plain hooks, one run at a time.

    Raises:
        PatchError: noise or ids of the wrong shape, positions out of range, an unknown source or base.
        SiteError: a site that the encoder does not have.
        ModelError: an encoder, output or engine that is not supported.
        NumericsError: a run that is not finite, by number.
    """
    request = _request(encoder, input_ids, patches, noise, base, sources, output, attention_mask)
    with torch.no_grad():
        clean, corrupted, restored = _engine(engine)(request)
    _check_finite(restored.flatten(0, 1), len(request.runs))
    if noise.ndim == 2:
        return TextTrace(clean, corrupted[0], restored[0])
    return TextTrace(clean, corrupted, restored)


def _engine(name: str) -> Callable[[TextRequest], tuple[Tensor, Tensor, Tensor]]:
    if name == "oracle":
        from .oracle import trace_text_oracle

        return trace_text_oracle
    if name == "fast":
        from .packed_text import trace_text_packed

        return trace_text_packed
    raise ModelError(f'engine={name!r}: expected "fast" or "oracle"')


def _check_finite(restored: Tensor, runs: int) -> None:
    bad = sorted({row % runs for row in nan_rows(restored)})
    if bad:
        raise NumericsError(
            f"{len(bad)} of {runs} text runs are not finite (first: run {bad[0]}) in {restored.dtype}: "
            "use float32 or bfloat16 for the text encoder, or check the source tensors"
        )


def _request(
    encoder: Any,
    input_ids: Tensor | Sequence[int],
    patches: Iterable[PatchSet],
    noise: Tensor,
    base: str,
    sources: Mapping[str, Tensor | Sequence[int]] | None,
    output: str,
    attention_mask: Tensor | Sequence[int] | None,
) -> TextRequest:
    if not is_supported(encoder):
        raise ModelError(f"{type(encoder).__name__} is not supported: expected {SUPPORTED}")
    sites = {encoder_path(site.name): site for site in part_sites(encoder, "text_encoder")}
    if output not in OUTPUTS:
        raise ModelError(f"output={output!r}: expected one of {', '.join(OUTPUTS)}")
    if base not in BASES:
        raise PatchError(f"base={base!r}: expected one of {', '.join(BASES)}")
    embedding = word_embedding(encoder).weight
    ids = torch.as_tensor(input_ids, device=embedding.device).long()
    if ids.ndim != 1 or ids.shape[0] == 0:
        raise PatchError(f"input_ids has shape {list(ids.shape)}: expected [T], one prompt")
    length, width = ids.shape[0], embedding.shape[1]
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise PatchError(f"input_ids has {length} tokens: the encoder takes at most {limit}")
    if not isinstance(noise, Tensor) or noise.ndim not in (2, 3) or noise.shape[-2:] != (length, width):
        shape = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise PatchError(f"noise has shape {shape}: expected [{length}, {width}] or [S, {length}, {width}]")
    depth = len([site for site in sites.values() if site.kind == "hidden"]) - (output == "penultimate")
    column = _pooled_column(encoder, ids) if output == "pooled" else None
    named = {name: torch.as_tensor(value, device=embedding.device).long() for name, value in (sources or {}).items()}
    for name, value in named.items():
        if name in ("clean", "corrupted"):
            raise PatchError(f"sources has the name {name!r}, which means this trace's own run: choose another")
        if value.shape != (length,):
            raise PatchError(f"sources[{name!r}] has shape {list(value.shape)}: expected [{length}], as input_ids")
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=embedding.device).long()
    if mask is not None and mask.shape != (length,):
        raise PatchError(f"attention_mask has shape {list(mask.shape)}: expected [{length}]")
    runs = as_runs(patches)
    for patch in (patch for run in runs for patch in run):
        if encoder_path(patch.site) not in sites:
            raise SiteError(
                f"{type(encoder).__name__} has no site {patch.site!r}: it has {', '.join(list(sites)[:3])}, ..."
            )
        if patch.branch != "cond":
            raise PatchError(f"{patch.site}: branch={patch.branch!r}, but a text encoder has no guidance branches")
        patch.within(length, None, {"clean", "corrupted", *named})
    samples = noise.to(embedding) if noise.ndim == 3 else noise.to(embedding)[None]
    return TextRequest(encoder, ids, samples, runs, sites, base, named, output, mask, depth, column)


def _pooled_column(encoder: Any, ids: Tensor) -> int:
    """The token whose state CLIP pools: the first end of text, as transformers finds it."""
    eos = getattr(getattr(encoder, "text_model", encoder), "eos_token_id", None)
    if eos is None:
        raise ModelError(f'{type(encoder).__name__} has no pooled output: use output="last" or "penultimate"')
    # Configurations from before transformers 4.31 say 2, and mean the highest id of the vocabulary.
    return int(ids.argmax() if eos == 2 else (ids == eos).int().argmax())
