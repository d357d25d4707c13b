"""One study on one engine: requests built from the plan, traced in batches of groups, each scored as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..engine.denoise.trace import MOST_GROUPS, UNetTrace, plan_summary, run_request, trace_unet_many
from ..engine.requests.denoise import Added, UNetRequest, unet_request
from ..patch import ZERO, Patch
from ..pipeline import Condition, encode_negative, encode_prompt, latent_shape
from ..prompts import Prompt
from ..sites import Site
from .conditions import TextStates, text_states
from .groups import Group, PromptPlan, Run, patch_source, unet_patches
from .injection import trace_injected
from .means import text_means, unet_means
from .settings import INJECT, Settings

# Results of one batch of groups, in bytes; they are held until they are scored.
RESULT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Piece:
    """Some of the runs of a group that have to be denoised: all of them, unless their results would be too large.

    Attributes:
        group: the group.
        runs: indices into the plan's runs.
        first, last: whether this is the first and the last piece of its group.
    """

    group: Group
    runs: tuple[int, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class Traced:
    """A piece with what came of it. ``trace`` is ``None`` where no metric needs denoising."""

    piece: Piece
    states: TextStates
    request: UNetRequest | None
    trace: UNetTrace | None


@dataclass(frozen=True)
class Options:
    """How a study is computed; see `fasttrace.run`."""

    engine: str = "fast"
    max_batch: int | None = None
    dtype: torch.dtype | None = None
    compile: bool = False

    def record(self) -> dict[str, Any]:
        """What of it decides the results beyond rounding, and the engine."""
        return {"engine": self.engine, "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch.")}


class Job:
    """A study being run."""

    def __init__(self, study: Settings, options: Options) -> None:
        self.study, self._options = study, options
        self._states: tuple[str, TextStates] | None = None
        self._encoded: tuple[str, Condition] | None = None
        self._negative = encode_negative(self.study.pipe, self.study.negative_prompt) if self.study.needs_unet else None

    def trace(self, groups: Sequence[Group], progress: Callable[[int], None]) -> Iterator[Traced]:
        """Run groups, in order, several at a time.

        Args:
            groups: which.
            progress: told the number of runs that are done since it was last told.
        """
        for batch in self._batches(groups):
            states = [self._text(piece.group.plan) for piece in batch]
            if not self.study.needs_unet:
                for piece, own in zip(batch, states, strict=True):
                    yield Traced(piece, own, None, None)
                    progress(_run_count(piece))
                continue
            requests = [self._request(piece, own) for piece, own in zip(batch, states, strict=True)]
            told = _Fraction(sum(map(_run_count, batch)), progress)
            traces = self._traces(batch, requests, states, told)
            for piece, own, request, trace in zip(batch, states, requests, traces, strict=True):
                yield Traced(piece, own, request, trace)
            told.finish()

    def example_request(self, plan: PromptPlan) -> UNetRequest:
        """The request of a prompt's first group with empty text states: what an engine needs to count the cost."""
        group = Group(plan, self.study.seeds_of(plan.prompt)[0], 0)
        blank = self._blank()
        states = TextStates(blank, [blank], blank.embeds.expand(1, len(plan.texts), *blank.embeds.shape), None)
        if blank.pooled is not None:
            pooled = blank.pooled.expand(1, len(plan.texts), -1)
            states = TextStates(blank, [blank], states.restored, pooled)
        return self._request(Piece(group, plan.distinct, True, True), states, counting=True)

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Piece]]:
        """Pieces that share UNet calls, and whose results fit into memory together."""
        limit = max(1, RESULT_BYTES // self._run_bytes())
        batch: list[Piece] = []
        room = limit
        for group in groups:
            runs = group.plan.distinct
            starts = range(0, max(1, len(runs)), limit)
            for start in starts:
                piece = Piece(group, runs[start : start + limit], start == 0, start == starts[-1])
                if batch and (len(piece.runs) + 2 > room or len(batch) == MOST_GROUPS):
                    yield batch
                    batch, room = [], limit
                batch.append(piece)
                room -= len(piece.runs) + 2
        if batch:
            yield batch

    def _run_bytes(self) -> int:
        """Of one run's text states, and of its latents or outputs."""
        study, total = self.study, 1
        if any(one.has_text for one in study.site_sets):
            total += 4 * self._blank().embeds.numel()
        if study.needs_unet:
            steps = study.step_count if study.protocol == "teacher_forced" else 1
            total += 4 * steps * math.prod(latent_shape(study.pipe))
        return total

    def _text(self, plan: PromptPlan) -> TextStates:
        """Text states of a prompt, kept while its groups come one after another."""
        if self._states is None or self._states[0] != plan.prompt.id:
            self._states = plan.prompt.id, text_states(self.study, plan, self._means[0], self._options.engine)
        return self._states[1]

    def _other(self, prompt: Prompt) -> Condition:
        """The condition of the text that the source names."""
        text = self.study.text_of(self.study.source, prompt)
        if self._encoded is None or self._encoded[0] != text:
            self._encoded = text, encode_prompt(self.study.pipe, text)
        return self._encoded[1]

    def _request(self, piece: Piece, states: TextStates, counting: bool = False) -> UNetRequest:
        study, plan, sample = self.study, piece.group.plan, piece.group.noise_sample
        injecting = study.source.startswith(INJECT)
        runs = [] if injecting else [plan.runs[index] for index in piece.runs]
        sources: dict[str, Any] = {}
        bases = []
        for index in () if injecting else piece.runs:
            text = plan.text_of[index]
            bases.append(study.base if text < 0 else f"text {text}")
            if text >= 0:
                sources[bases[-1]] = _pair(states.condition(sample, text))
        if patch_source(study.source) == "other" and any(run.patches_unet for run in runs):
            sources["other"] = _pair(self._other(plan.prompt))
        patches = [self._patches(run, counting) for run in runs]
        return self._build(states.clean, states.corrupted[sample], patches, sources, bases, piece.group.seed)

    def _build(
        self,
        clean: Condition,
        corrupted: Condition,
        patches: list[tuple[Patch, ...]],
        sources: dict[str, Any],
        bases: list[str],
        seed: int,
    ) -> UNetRequest:
        study, negative = self.study, self._negative
        return unet_request(
            study.traced_pipe, clean.embeds, corrupted.embeds, patches, None, seed, study.num_inference_steps,
            study.guidance_scale, None if negative is None else negative.embeds, _added(clean), _added(corrupted),
            None if negative is None else _added(negative), sources, bases, study.protocol, study.eta,
            self._options.max_batch, self._options.compile, self._options.dtype,
        )  # fmt: skip

    def _patches(self, run: Run, counting: bool) -> tuple[Patch, ...]:
        """A run's UNet patches, with sources that are values in place of their names; any value will do to count."""
        patches = unet_patches(self.study, run)
        if self.study.source == "zero" or (counting and self.study.source == "mean"):
            return tuple(Patch(one.site, one.positions, one.steps, one.branch, ZERO) for one in patches)
        if self.study.source != "mean":
            return patches
        return tuple(
            Patch(one.site, one.positions, [step], one.branch, self._means[1][one.site][step])
            for one in patches
            for step in (range(self.study.step_count) if one.steps is None else one.steps)
        )

    def _traces(
        self, batch: list[Piece], requests: list[UNetRequest], states: list[TextStates], told: _Fraction
    ) -> Iterator[UNetTrace]:
        study = self.study
        if not study.source.startswith(INJECT):
            told.of(plan_summary(requests).rows)
            yield from trace_unet_many(requests, engine=self._options.engine, progress=told)
            return
        one = requests[0].steps * requests[0].branches
        told.of(one * sum(len(piece.runs) for piece in batch))
        most = 1 if self._options.engine == "oracle" else self._options.max_batch or 32
        rows = max(1, most // requests[0].branches)
        for piece, request, own in zip(batch, requests, states, strict=True):
            plan, sample = piece.group.plan, piece.group.noise_sample
            base = own.clean if study.base == "clean" else own.corrupted[sample]
            other = self._other(plan.prompt)
            chosen = [(plan.runs[index].site_set.sites, plan.runs[index].steps) for index in piece.runs]
            ends = run_request(request, self._options.engine)
            yield UNetTrace(ends.clean, ends.corrupted, trace_injected(request, base, other, chosen, rows, told))

    @cached_property
    def _means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean values of text and of UNet sites, where the source is the mean."""
        if self.study.source != "mean":
            return {}, {}
        sites: dict[str, Site] = {site.name: site for one in self.study.site_sets for site in one.sites}
        in_text = [site for site in sites.values() if site.part != "unet"]
        in_unet = [site for site in sites.values() if site.part == "unet"]

        def request_of(condition: Condition, seed: int) -> UNetRequest:
            return self._build(condition, condition, [], {}, [], seed)

        return text_means(self.study, in_text), unet_means(self.study, in_unet, request_of) if in_unet else {}

    def _blank(self) -> Condition:
        length = len(next(iter(self.study.tokens[self.study.text_parts[0]].values())).ids)
        embeds = torch.zeros(length, self.study.pipe.unet.config.cross_attention_dim)
        if self._negative is None or self._negative.pooled is None:
            return Condition(embeds)
        return Condition(embeds, torch.zeros_like(self._negative.pooled), self._negative.time_ids)


def _run_count(piece: Piece) -> int:
    """Runs of the table that a piece accounts for."""
    plan = piece.group.plan
    return len(piece.runs) + (len(plan.runs) - len(plan.distinct) if piece.last else 0)


def _added(condition: Condition) -> Added | None:
    if condition.pooled is None or condition.time_ids is None:
        return None
    return condition.pooled, condition.time_ids


def _pair(condition: Condition) -> Any:
    added = _added(condition)
    return condition.embeds if added is None else (condition.embeds, added)


class _Fraction:
    """Progress told in UNet rows, passed on in runs."""

    def __init__(self, runs: int, progress: Callable[[int], None]) -> None:
        self._runs, self._progress = runs, progress
        self._of, self._rows, self._told = 1, 0, 0

    def of(self, rows: int) -> None:
        self._of = max(1, rows)

    def __call__(self, rows: int) -> None:
        self._rows += rows
        self._tell(min(self._runs, self._runs * self._rows // self._of))

    def finish(self) -> None:
        self._tell(self._runs)

    def _tell(self, runs: int) -> None:
        self._progress(runs - self._told)
        self._told = runs
