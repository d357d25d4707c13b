"""The packed text pass: all runs through the model at once, each only where it differs from its base run."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..patch import Patch
from .decoder import Decoder, DecoderLayer, Heads, decoder_of, on_packed
from .text import TextRequest
from .text_entries import FlatPatches, differs_from, flatten, given_rows, split_entries
from .text_plan import ATTN, HIDDEN, MLP, Attention, Chunk, Group, Rows, TextPlan, TextShape, compile_plan

CHUNK_ROWS = 8192
MLP_ROWS = 2048
KEPT_PLANS = 8


@dataclass(frozen=True)
class Record:
    """One unpatched run, by layer: hidden states before each layer and after the last, site values, and heads."""

    hidden: list[Tensor]
    attn: list[Tensor]
    mlp: list[Tensor]
    heads: list[Heads]

    def value(self, layer: int, stage: int) -> Tensor:
        """``[T, D]`` at a site."""
        return (self.attn, self.mlp, self.hidden[1:])[stage][layer]


def trace_text_packed(request: TextRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Clean ``[T, D]``, corrupted ``[S, T, D]`` and restored ``[S, N, T, D]``; pooled outputs drop ``T``."""
    # A causal model does nothing for the tokens after the one that is read.
    length = request.ids.shape[0] if request.column is None else request.column + 1
    mask = None if request.attention_mask is None else request.attention_mask[:length]
    decoder = decoder_of(request.encoder, length, mask)
    del decoder.layers[request.depth :]
    flat = flatten(request)
    plan = _plan(request, decoder, flat, length)

    def run(ids: Tensor, noise: Tensor | None) -> Record:
        return record(decoder, decoder.embed(ids[:length], None if noise is None else noise[:length]))

    def read(hidden: Tensor) -> Tensor:
        """What the request asks for, of hidden states ``[R, D]``."""
        if request.output == "penultimate":
            return hidden
        normed = on_packed(decoder.final_norm, hidden)
        projection = getattr(request.encoder, "text_projection", None) if request.output == "pooled" else None
        return normed if projection is None else on_packed(projection, normed)

    def output(run: Record) -> Tensor:
        return read(run.hidden[-1] if request.column is None else run.hidden[-1][-1:])

    records = {name: run(ids, None) for name, ids in {**request.sources, "clean": request.ids}.items()}
    outputs = {"clean": output(records["clean"])}
    samples, runs = request.noise.shape[0], len(request.runs)
    corrupted = outputs["clean"].new_empty(samples, *outputs["clean"].shape)
    restored = corrupted.new_empty(samples, runs, *outputs["clean"].shape)
    for sample, noise in enumerate(request.noise):
        records["corrupted"] = run(request.ids, noise)
        outputs["corrupted"] = corrupted[sample] = output(records["corrupted"])
        restored[sample] = outputs[request.base]
        flattened = restored[sample].flatten(0, 1)
        for chunk in plan.chunks:
            hidden = _run_chunk(request, decoder, chunk, records, flat.sources)
            flattened[torch.from_numpy(chunk.target)] = read(hidden[torch.from_numpy(chunk.final)])
    if request.column is not None:
        return outputs["clean"][0], corrupted[:, 0], restored[:, :, 0]
    return outputs["clean"], corrupted, restored


def record(decoder: Decoder, hidden: Tensor) -> Record:
    """Run one prompt unpatched, ``[T, D]``, and keep what patched runs read."""
    result = Record([hidden], [], [], [])
    positions = torch.arange(hidden.shape[0], device=hidden.device)
    for layer in decoder.layers:
        q, k, v = layer.project(on_packed(layer.norm_attn, hidden), positions)
        attended = _attend(q[None], k[None], v[None], decoder.bias, layer.scale)
        attn = on_packed(layer.out, attended.flatten(0, 1))
        middle = hidden + attn
        mlp = on_packed(layer.mlp, on_packed(layer.norm_mlp, middle))
        hidden = middle + mlp
        result.hidden.append(hidden)
        result.attn.append(attn)
        result.mlp.append(mlp)
        result.heads.append((q, k, v))
    return result


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """``q`` ``[n, Q, H, d]``, ``k`` and ``v`` ``[n, T, G, d]``, ``bias`` ``[1 or H, Q, T]``: ``[n, Q, H x d]``."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=grouped)
    return result.transpose(1, 2).flatten(2)


def _run_chunk(
    request: TextRequest, decoder: Decoder, chunk: Chunk, records: dict[str, Record], sources: list[Patch]
) -> Tensor:
    """The packed state ``[slots, D]`` of a chunk after the last layer."""
    base = records[request.base]
    state = base.hidden[0].new_empty(chunk.slots, base.hidden[0].shape[1])

    def source_rows(source: int, layer: int, stage: int, tokens: Tensor) -> Tensor:
        patch = sources[source]
        if isinstance(patch.source, str):
            return records[patch.source].value(layer, stage)[tokens]
        return given_rows(patch, tokens, request.ids.shape[0], state)

    for number, (layer, plan) in enumerate(zip(decoder.layers, chunk.layers, strict=True)):
        attended = None
        if plan.attention is not None:
            attended = on_packed(layer.out, _attention(decoder, layer, plan.attention, base.heads[number], state))
        for stage, work in enumerate(plan.stages):
            slots, tokens = _tensors(work.join)
            joining = (base.hidden[number], None, base.hidden[number + 1])[stage]
            if joining is None:
                joining = base.hidden[number] + base.attn[number]
            state[slots] = joining[tokens]
            computed = torch.from_numpy(work.computed)
            if stage == ATTN and attended is not None:
                state.index_add_(0, computed, attended)
            if stage == MLP and len(computed):
                for rows in torch.split(computed, MLP_ROWS):
                    state.index_add_(0, rows, on_packed(layer.mlp, on_packed(layer.norm_mlp, state[rows])))
            slots, tokens = _tensors(work.based)
            state.index_add_(0, slots, base.value(number, stage)[tokens])
            for source, where in work.sets:
                slots, tokens = _tensors(where)
                if stage == HIDDEN:
                    state[slots] = 0
                state.index_add_(0, slots, source_rows(source, number, stage, tokens))
            for source, where in work.adds:
                slots, tokens = _tensors(where)
                state.index_add_(0, slots, source_rows(source, number, stage, tokens))
    return state


def _attention(decoder: Decoder, layer: DecoderLayer, plan: Attention, base: Heads, state: Tensor) -> Tensor:
    slots, tokens = _tensors(plan.rows)
    heads = layer.project(on_packed(layer.norm_attn, state[slots]), tokens)
    results = [_group(decoder, layer, group, base, heads).flatten(0, 1) for group in plan.groups]
    result = torch.cat(results)
    return result if plan.chosen is None else result[torch.from_numpy(plan.chosen)]


def _group(decoder: Decoder, layer: DecoderLayer, group: Group, base: Heads, heads: Heads) -> Tensor:
    begin, end = group.rows
    length = decoder.bias.shape[-1]
    span = length - group.start
    split = begin + group.steady * span
    full = []
    for own, shared in zip(heads, base, strict=True):
        steady = own[begin:split].view(group.steady, span, *own.shape[1:])
        fresh = shared[group.start :].repeat(group.fresh, 1, 1)
        fresh[torch.from_numpy(group.scatter)] = own[split:end]
        full.append(torch.cat((steady, fresh.view(group.fresh, span, *own.shape[1:]))))
    q, k, v = full
    prefix = [x[: group.start].expand(len(q), -1, -1, -1) for x in base[1:]]
    k, v = torch.cat((prefix[0], k), dim=1), torch.cat((prefix[1], v), dim=1)
    return _attend(q[:, group.query_start - group.start :], k, v, decoder.bias[:, group.query_start :], layer.scale)


def _tensors(rows: Rows) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows.slots), torch.from_numpy(rows.tokens)


_PLANS: OrderedDict[object, TextPlan] = OrderedDict()


def _plan(request: TextRequest, decoder: Decoder, flat: FlatPatches, length: int) -> TextPlan:
    """The compiled plan, kept for the next prompt or noise sample with the same patches."""
    shape = TextShape(len(decoder.layers), length, decoder.causal, request.column is not None)
    full = request.ids.shape[0]
    differs = differs_from(request, flat.sources)
    if not decoder.causal:
        differs = np.where(differs < full, 0, full)
    key = shape, full, len(request.runs), differs.tobytes(), flat.key
    if key not in _PLANS:
        sets, adds = split_entries(flat, differs, full)
        _PLANS[key] = compile_plan(shape, len(request.runs), sets, adds, CHUNK_ROWS)
        while len(_PLANS) > KEPT_PLANS:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    return _PLANS[key]
