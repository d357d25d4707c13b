"""The packed text pass: all runs through the model at once, each only where it differs from its base run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...models.text.description import Heads, Layer, attended
from ...models.text.families import text_head
from ..requests.text import TextRequest
from .attention import suffix_attention
from .bypassed import check_bypassed
from .compile import compile_plan
from .entries import FlatPatches, differs_from, flatten, given_rows, split_entries
from .linear import on_packed
from .on_ops import linear_calls
from .plan import ATTN, HIDDEN, MLP, Attention, Chunk, HeadPatches, LayerPlan, Stage, TextPlan, TextShape

# Packed tokens that pass through the model together. A CPU is quickest while they stay in its cache.
_CHUNK_ROWS = {"cpu": 8192}
_MLP_ROWS = {"cpu": 1024}
_MANY_ROWS = 65536
_KEPT_PLANS = 4


@dataclass(frozen=True)
class Record:
    """One unpatched run, by layer: hidden states before each layer and after the last, site values, and heads.

    ``attended`` is each attention's result ``[T, H x d]`` before its output projection.
    """

    hidden: list[Tensor]
    attn: list[Tensor]
    mlp: list[Tensor]
    heads: list[Heads]
    attended: list[Tensor]

    def value(self, layer: int, stage: int) -> Tensor:
        """``[T, D]`` at a site."""
        return (self.attn, self.mlp, self.hidden[1:])[stage][layer]

    def joining(self, layer: int, stage: int) -> Tensor:
        """``[T, D]``: what a run's hidden state is as it joins at a site, before the site's value is added."""
        if stage == MLP:
            return self.hidden[layer] + self.attn[layer]
        return self.hidden[layer + (stage == HIDDEN)]


def trace_text_packed(request: TextRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Clean ``[T, D]``, corrupted ``[S, T, D]``, restored ``[S, N, T, D]``; without ``T`` where one token is read."""
    packed = PackedText(request)
    samples, runs, shape = len(request.noise), len(request.runs), packed.clean.shape
    corrupted = packed.clean.new_empty(samples, *shape)
    restored = packed.clean.new_empty(samples, runs, *shape) if request.out is None else request.out
    for sample, noise in enumerate(request.noise):
        corrupted[sample], parts = packed.sample(noise)
        for numbers, outputs in parts:
            restored[sample].index_copy_(0, numbers, outputs)
    return packed.clean, corrupted, restored


class PackedText:
    """A request's plan and its unpatched runs; ``sample`` makes the rest, for one noise sample at a time."""

    def __init__(self, request: TextRequest) -> None:
        check_bypassed(request)
        self.request = request
        self.model = request.model
        self.layers = self.model.layers[: request.depth]
        self.length = _length(request)
        mask = request.attention_mask
        self.constants = self.model.constants(self.length, None if mask is None else mask[: self.length])
        flat = flatten(request)
        self.sources = flat.sources
        self.plan = _compile(request, self.length, flat)
        prompts = {**request.sources, "clean": request.ids}
        self.records = {name: self._record(ids, None) for name, ids in prompts.items()}
        self.clean = self._output(self.records["clean"].hidden[-1])
        rows = self.plan.token_layers // max(1, len(self.layers))
        self.call = linear_calls(self.records["clean"].hidden[0], rows)
        bias, causal, like = self.constants.bias, self.model.family.causal, self.records["clean"].heads[0][0]
        self.attend = suffix_attention(request.attention, bias, causal, like)

    def sample(self, noise: Tensor) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
        """The corrupted output, and the restored ones in parts: numbers of some runs ``[n]``, and their outputs."""
        corrupted = self._record(self.request.ids, noise)
        output = self._output(corrupted.hidden[-1])
        records = {**self.records, "corrupted": corrupted}
        return output, self._parts(records, output if self.request.base == "corrupted" else self.clean)

    def _parts(self, records: dict[str, Record], base: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self.plan.idle):
            yield self.plan.idle, base.expand(len(self.plan.idle), *base.shape)
        for chunk in self.plan.chunks:
            outputs = base.repeat(len(chunk.runs), *(1 for _ in base.shape))
            rows = outputs if self.request.column is not None else outputs.flatten(0, 1)
            rows.index_copy_(0, chunk.target, self._read(self._run(chunk, records)[chunk.final]))
            yield chunk.runs, outputs

    def _record(self, ids: Tensor, noise: Tensor | None) -> Record:
        """One prompt ``[T]``, unpatched, with the modules as they are."""
        noise, call = None if noise is None else noise[: self.length], on_packed
        hidden = self.model.embed(call, ids[: self.length], self.constants, noise)
        result = Record([hidden], [], [], [], [])
        positions = torch.arange(self.length, device=hidden.device)
        for layer in self.layers:
            heads = layer.project(call, call(layer.norm_attn, hidden), positions, self.constants)
            q, k, v = (x[None] for x in heads)
            mixed = attended((q, k, v), self.constants.bias, layer.scale)[0]
            attn = call(layer.out, mixed)
            middle = hidden + attn
            mlp = call(layer.mlp.module, call(layer.norm_mlp, middle))
            hidden = middle + mlp
            result.hidden.append(hidden)
            result.attn.append(attn)
            result.mlp.append(mlp)
            result.heads.append(heads)
            result.attended.append(mixed)
        return result

    def _output(self, hidden: Tensor) -> Tensor:
        """What the request returns of one run's last hidden states ``[T, D]``."""
        column = self.request.column
        return self._read(hidden) if column is None else self._read(hidden[column : column + 1])[0]

    def _read(self, hidden: Tensor) -> Tensor:
        """What the request returns of hidden states ``[R, D]``."""
        request = self.request
        if request.output == "penultimate":
            return hidden
        normed = on_packed(self.model.final_norm, hidden)
        return normed if request.output == "last" else text_head(on_packed, request.encoder, normed, request.answers)

    def _run(self, chunk: Chunk, records: dict[str, Record]) -> Tensor:
        """The packed state ``[slots, D]`` of a chunk after the last layer."""
        base = records[self.request.base]
        state = torch.empty_like(base.hidden[0][:1]).repeat(chunk.slots, 1)
        for number, plan in enumerate(chunk.layers):
            layer = self.layers[number]
            attended = self._attended(number, plan, base, records, state)
            for stage, work in enumerate(plan.stages):
                state.index_copy_(0, work.join.slots, base.joining(number, stage)[work.join.tokens])
                if stage == ATTN and attended is not None:
                    new = self.call.plus(layer.out, attended, state[work.computed])
                    state.index_copy_(0, work.computed, new)
                elif stage == MLP:
                    self._mlp(layer, work.computed, state)
                self._patch(work, number, stage, base, records, state)
        return state

    def _attended(
        self, number: int, plan: LayerPlan, base: Record, records: dict[str, Record], state: Tensor
    ) -> Tensor | None:
        """A layer's attention at the computed columns ``[C, H x d]``, its heads patched, before the projection."""
        layer, result = self.layers[number], None
        if plan.attention is not None:
            result = self._attention(layer, plan.attention, base.heads[number], state)
        return result if plan.heads is None else self._patch_heads(plan.heads, number, base, records, result)

    def _patch_heads(
        self, work: HeadPatches, number: int, base: Record, records: dict[str, Record], attended: Tensor | None
    ) -> Tensor:
        split = base.heads[number][0].shape[1:]
        own = base.attended[number].view(-1, *split)
        result = own[work.based]
        if attended is not None:
            result = torch.cat([attended.view(-1, *split), result])
        for patches, adding in ((work.sets, False), (work.adds, True)):
            for source, where in patches:
                patch = self.sources[source]
                if isinstance(patch.source, str):
                    value = records[patch.source].attended[number].view(-1, *split)[where.tokens, where.heads]
                else:
                    value = given_rows(patch, where.tokens, self.request.ids.shape[0], own)
                result.index_put_((where.rows, where.heads), value, accumulate=adding)
        return result.flatten(1)

    def _mlp(self, layer: Layer, slots: Tensor, state: Tensor) -> None:
        for rows in torch.split(slots, _MLP_ROWS.get(state.device.type, _MANY_ROWS)):
            residual = state[rows]
            new = self.call.feed_forward(layer.mlp, on_packed(layer.norm_mlp, residual), residual)
            state.index_copy_(0, rows, new)

    def _patch(
        self, work: Stage, layer: int, stage: int, base: Record, records: dict[str, Record], state: Tensor
    ) -> None:
        """Add the site's values that come from elsewhere. A hidden state is the whole value, so it starts from zero."""
        state.index_add_(0, work.based.slots, base.value(layer, stage)[work.based.tokens])
        for source, rows in work.sets:
            if stage == HIDDEN:
                state.index_fill_(0, rows.slots, 0)
            state.index_add_(0, rows.slots, self._source(source, layer, stage, rows.tokens, records, state))
        for source, rows in work.adds:
            state.index_add_(0, rows.slots, self._source(source, layer, stage, rows.tokens, records, state))

    def _source(
        self, source: int, layer: int, stage: int, tokens: Tensor, records: dict[str, Record], state: Tensor
    ) -> Tensor:
        """A source's values ``[n, D]`` at a site."""
        patch = self.sources[source]
        if isinstance(patch.source, str):
            return records[patch.source].value(layer, stage)[tokens]
        return given_rows(patch, tokens, self.request.ids.shape[0], state)

    def _attention(self, layer: Layer, plan: Attention, base: Heads, state: Tensor) -> Tensor:
        """Attention's result ``[C, H x d]`` at the computed columns, before the output projection."""
        normed = on_packed(layer.norm_attn, state[plan.rows.slots])
        own = layer.project(self.call, normed, plan.rows.tokens, self.constants)
        queries = sum(part.queries for part in plan.parts)
        result = own[0].new_empty(queries, *own[0].shape[1:])
        live = done = 0
        for part in plan.parts:
            q, k, v = (mine[live : live + part.live] for mine in own)
            if part.filled is not None:
                q, k, v = (
                    shared[part.suffixes.tokens].index_copy_(0, part.filled, mine)
                    for shared, mine in zip(base, (q, k, v), strict=True)
                )
            out = result[done : done + part.queries]
            if part.chosen is None:
                self.attend((q, k, v), base, part.suffixes, layer.scale, out)
            else:
                everything = torch.empty_like(q)
                self.attend((q, k, v), base, part.suffixes, layer.scale, everything)
                torch.index_select(everything, 0, part.chosen, out=out)
            live, done = live + part.live, done + part.queries
        return result.flatten(1)


_PLANS: OrderedDict[object, TextPlan] = OrderedDict()


def plan_of(request: TextRequest) -> TextPlan:
    """The plan of a request, without running it."""
    return _compile(request, _length(request), flatten(request))


def forget_plans() -> None:
    """Drop the compiled plans that are kept."""
    _PLANS.clear()


def _length(request: TextRequest) -> int:
    """The number of tokens that run: a causal model does nothing after the one that is read."""
    causal = request.model.family.causal
    return request.column + 1 if causal and request.column is not None else len(request.ids)


def _compile(request: TextRequest, length: int, flat: FlatPatches) -> TextPlan:
    """The plan, kept for the next prompt or noise sample with the same patches."""
    device, full, causal = request.ids.device, request.ids.shape[0], request.model.family.causal
    shape = TextShape(request.depth, length, causal, request.column)
    differs = differs_from(request, flat.sources)
    if not causal:
        differs = np.where(differs < full, 0, full)
    rows = request.max_rows or _CHUNK_ROWS.get(device.type, _MANY_ROWS)
    key = shape, full, len(request.runs), rows, device, differs.tobytes(), flat.key
    if key not in _PLANS:
        sets, adds = split_entries(flat, differs, full)
        _PLANS[key] = compile_plan(shape, len(request.runs), sets, adds, rows, device)
        while len(_PLANS) > _KEPT_PLANS:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    return _PLANS[key]
