"""Running rows: planned into calls that fit in memory, one after another, on a shadow of the user's denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...models.attention import has_hooks
from ...models.heads import with_heads
from ...ops.selection import runs_on_ops
from ...pipeline import Condition, Conditions
from ..requests.denoise import DenoiserRequest
from .architectures import Conditioned, architecture_of
from .compile import CompiledDenoiser
from .cost import Cost, cost_of
from .execute import Trail
from .forward import CallInputs, Model, call_model, laid_out
from .memory import BatchSize, is_out_of_memory
from .packing import BUCKET
from .patching import Cache
from .plan import CallPlan, plan_calls
from .runs import Key, Row
from .shadow import shadow_of


class DenoiserCalls:
    """The denoiser of some requests, ready to run rows.

    Attributes:
        joins: whether rows may join a call at their site.
        texts_of: for each request the row of each of its conditions in the table of all conditions.
    """

    def __init__(self, requests: Sequence[DenoiserRequest], progress: Callable[[int], None] | None = None) -> None:
        request = self._request = requests[0]
        self._progress = progress or (lambda rows: None)
        conditions: list[Condition] = []
        self.texts_of: list[dict[str | None, int]] = []
        for one in requests:
            named: list[tuple[str | None, Condition]] = [*one.conditions.items()]
            if one.negative is not None:
                named.append((None, one.negative))
            self.texts_of.append({name: len(conditions) + place for place, (name, _) in enumerate(named)})
            conditions += [condition for _, condition in named]
        denoiser = request.denoiser
        guidance = denoiser.guidance(request.guidance_scale)
        self._dtype = request.dtype or request.latents.dtype
        module = shadow_of(denoiser.model, self._dtype)
        architecture = architecture_of(module)
        used = {name for one in requests for name in one.sites}
        on_ops = runs_on_ops(module.device) and not request.compile
        description = with_heads(architecture.describe(module, on_ops), used)
        self._batch = batch_size(request, cost_of(description, request.dims))
        texts = Conditions.of([one.to(module.device, self._dtype) for one in conditions])
        scale = None if guidance is None else guidance.to(self._dtype)
        given = Conditioned(denoiser, module, texts, scale, request.dims)
        shared = architecture.shared(given, description) if description.runs else {}
        self._model = Model(given, description, shared, any(has_hooks(one) for one in module.modules()))
        self._compiled: CompiledDenoiser | None = None
        if request.compile and description.runs:
            asked = {name: site for name, site in description.sites.items() if site.listed or name in used}
            shapes = {name: site.shape(request.dims) for name, site in asked.items()}
            mode = request.compile if isinstance(request.compile, str) else None
            self._compiled = CompiledDenoiser(self._model, shapes, mode)
        self.joins = description.runs
        self._planned: tuple[list[Row], int, list[CallPlan]] = ([], 0, [])

    def run(self, rows: list[Row], inputs: dict[Key, Tensor], timestep: Tensor) -> dict[Key, Tensor]:
        """What the scheduler is given of each row, before guidance, in the shape of its latents.

        Args:
            rows: a row that others copy from comes before them.
            inputs: latents that each row reads.
            timestep: of all rows.
        """
        outputs: dict[Key, Tensor] = {}
        todo = rows
        while todo:
            try:
                self._run(todo, inputs, timestep, outputs)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._batch.halve():
                    raise
            # What is finished stays, but for the rows that unfinished ones copy from.
            rest = [row for row in rows if row.key not in outputs]
            read = {key for row in rest for key in (row.parent, *(source for _, source in row.patches))}
            todo = [row for row in rows if row.key not in outputs or row.key in read]
        return outputs

    def _run(self, rows: list[Row], inputs: dict[Key, Tensor], timestep: Tensor, outputs: dict[Key, Tensor]) -> None:
        cache: Cache = {}
        trail: Trail = {}
        latents = self._request.latents
        for plan in self._plans(rows):
            samples = [inputs[row.key] for row in plan.rows[: plan.roots]]
            sample = torch.stack(samples) if samples else latents.new_empty(0, *latents.shape)
            call = CallInputs(
                laid_out(sample.to(self._dtype)),
                timestep[None],
                plan.text,
            )
            if self._compiled is not None and plan.lockstep:
                output = self._compiled(call, plan)
            else:
                output = call_model(self._model, call, plan, cache, trail)
            for row, value in zip(plan.rows, output.to(latents.dtype), strict=True):
                outputs.setdefault(row.key, value)
            for spent in plan.spent:
                del cache[spent]
            self._progress(len(plan.rows))

    def _plans(self, rows: list[Row]) -> list[CallPlan]:
        """Plans of the same rows are kept: most steps repeat the one before."""
        if (rows, self._batch.rows) != self._planned[:2]:
            device = self._request.latents.device
            budget, lockstep = call_rows(self._batch.rows, self._compiled is not None)
            plans = plan_calls(rows, budget, self._model.description, self._positions, device, lockstep)
            self._planned = (rows, self._batch.rows, plans)
        return self._planned[2]

    def _positions(self, name: str) -> int:
        return self._model.description.positions(name, self._request.dims)


def call_rows(budget: int, compiled: bool) -> tuple[int, bool]:
    """Most rows of a call, and whether calls are laid out for compiled graphs, which have whole buckets of rows."""
    lockstep = compiled and budget >= BUCKET
    return budget // BUCKET * BUCKET if lockstep else budget, lockstep


def batch_size(request: DenoiserRequest, cost: Cost | None = None) -> BatchSize:
    """The batch size for requests like this one, of which a row costs so much."""
    model, dims = request.denoiser.model, request.dims
    cost = cost or cost_of(request.description, dims)
    size = (dims.height, dims.width, dims.tokens)
    return BatchSize(model, cost, size, request.dtype or request.latents.dtype, request.max_batch)
