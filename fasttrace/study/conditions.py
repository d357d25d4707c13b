"""The text side of a study: clean, corrupted and restored text states of one prompt, as the UNet reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.text.trace import trace_text
from ..patch import ZERO, Patch, Source
from ..pipeline import Condition, default_time_ids, needs_added
from ..prompts import TokenizedPrompt
from .groups import PromptPlan, TextPatches, patch_source
from .settings import Settings


@dataclass(frozen=True)
class TextStates:
    """Text states of one prompt.

    Attributes:
        clean: without noise.
        corrupted: one for each noise sample.
        restored: ``[S, K, T, D]``: for each noise sample, the plan's ``K`` distinct text patches.
        pooled: SDXL's pooled embeddings of ``restored``, ``[S, K, P]``.
    """

    clean: Condition
    corrupted: list[Condition]
    restored: Tensor
    pooled: Tensor | None

    def condition(self, sample: int, text: int) -> Condition:
        pooled = None if self.pooled is None else self.pooled[sample, text]
        return Condition(self.restored[sample, text], pooled, self.clean.time_ids)


def text_states(study: Settings, plan: PromptPlan, means: Mapping[str, Tensor], engine: str) -> TextStates:
    """Run every text encoder on one prompt, clean, corrupted and patched, for all noise samples.

    A patch in one encoder leaves the others at the base. What the UNet reads of each encoder is put together as the
    pipeline does: SDXL's penultimate layers side by side, and the second encoder's pooled output.

    Args:
        study: the study.
        plan: of the prompt.
        means: ``[T, D]`` by site, for the source ``"mean"``.
        engine: ``"fast"`` or ``"oracle"``.
    """
    traces = {part: _trace_part(study, plan, part, means, engine) for part in study.text_parts}
    states = [outputs[0] for outputs in traces.values()]
    clean, corrupted, restored = (torch.cat(tensors, -1) for tensors in zip(*states, strict=True))
    if not needs_added(study.pipe):
        return TextStates(Condition(clean), [Condition(one) for one in corrupted], restored, None)
    time_ids = default_time_ids(study.pipe).to(clean)
    pooled = traces[study.text_parts[-1]][1]
    noised = [Condition(*both, time_ids) for both in zip(corrupted, pooled[1], strict=True)]
    return TextStates(Condition(clean, pooled[0], time_ids), noised, restored, pooled[2])


States = tuple[Tensor, Tensor, Tensor]
"""Clean ``[T, D]``, corrupted ``[S, T, D]``, and one restored state for each of the plan's texts, ``[S, K, T, D]``."""


def _trace_part(study: Settings, plan: PromptPlan, part: str, means: Mapping[str, Tensor], engine: str) -> list[States]:
    """One encoder: for each output that the UNet reads of it, the states of every text of the plan."""
    encoder, tokens = getattr(study.pipe, part), study.tokens[part][plan.prompt.id]
    assert study.sigma is not None
    width = encoder.get_input_embeddings().weight.shape[1]
    draws = range(study.corruption.samples)
    noise = [
        study.corruption.draw(study.sigma[part], sample, len(tokens.ids), tokens.subject, width) for sample in draws
    ]
    own = [tuple(one for one in text if one[0].partition(".")[0] == part) for text in plan.texts]
    runs = [one for one in dict.fromkeys(own) if one]
    numbers = {one: index for index, one in enumerate(runs)}
    sources = {}
    if patch_source(study.source) == "other":
        sources["other"] = _ids(study, part, study.text_of(study.source, plan.prompt))
    outputs: list[States] = []
    for output in study.reads(part):
        trace = trace_text(
            encoder,
            list(tokens.ids),
            [_patches(study, one, means) for one in runs],
            torch.stack(noise),
            base=study.base,
            sources=sources,
            output=output,
            attention_mask=attention_mask(encoder, tokens),
            engine=engine,
        )
        clean = trace.clean.expand_as(trace.corrupted)
        base = trace.corrupted if study.base == "corrupted" else clean
        rows = [trace.restored[:, numbers[one]] if one else base for one in own]
        restored = torch.stack(rows, 1) if rows else base.new_empty(len(noise), 0, *base.shape[1:])
        outputs.append((trace.clean, trace.corrupted, restored))
    return outputs


def _patches(study: Settings, text: TextPatches, means: Mapping[str, Tensor]) -> tuple[Patch, ...]:
    source = patch_source(study.source)
    return tuple(Patch(site, positions, source=_value(source, site, means)) for site, positions in text)


def _value(source: str, site: str, means: Mapping[str, Tensor]) -> Source:
    return ZERO if source == "zero" else means[site] if source == "mean" else source


def _ids(study: Settings, part: str, text: str) -> list[int]:
    tokenizer = study.tokenizer(part)
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return [int(token) for token in encoded["input_ids"]]


def attention_mask(encoder: Any, tokens: TokenizedPrompt) -> list[int] | None:
    """The attention mask ``[T]``, for the few encoders whose pipelines pass one."""
    if not getattr(encoder.config, "use_attention_mask", False):
        return None
    return [int(position <= tokens.eos) for position in range(len(tokens.ids))]
