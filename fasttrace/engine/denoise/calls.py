"""Running rows: planned into UNet calls that fit in memory, one after another, on a shadow of the user's UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...pipeline import Condition, timestep_condition
from ...sites import part_sites
from .compile import CompiledUNet
from .cost import UNetCost, unet_cost
from .forward import CallInputs, Model, Texts, call_unet
from .memory import BatchSize, is_out_of_memory
from .patching import Cache
from .plan import BUCKET, CallPlan, plan_calls, site_order
from .request import UNetRequest, site_shape
from .runs import Key, Row
from .shadow import shadow_of
from .stream import Trail
from .units import flat_units, has_hooks, text_keys


class UNetCalls:
    """The UNet of some requests, ready to run rows.

    Attributes:
        joins: whether rows may join a call at their site.
        texts_of: for each request the row of each of its conditions in the table of all conditions.
    """

    def __init__(self, requests: Sequence[UNetRequest], progress: Callable[[int], None] | None = None) -> None:
        request = self._request = requests[0]
        self._progress = progress or (lambda rows: None)
        self._order = site_order(request.pipe.unet)
        self._size = (request.latents.shape[1], request.latents.shape[2])
        self._sites = {name: site for one in requests for name, site in one.sites.items()}
        self._batch = batch_size(request)
        conditions: list[Condition] = []
        self.texts_of: list[dict[str | None, int]] = []
        for one in requests:
            named: list[tuple[str | None, Condition]] = [*one.conditions.items()]
            if one.negative is not None:
                named.append((None, one.negative))
            self.texts_of.append({name: len(conditions) + place for place, (name, _) in enumerate(named)})
            conditions += [condition for _, condition in named]
        guidance = timestep_condition(request.pipe, request.guidance_scale)
        self._dtype = request.dtype or request.latents.dtype
        unet = shadow_of(request.pipe.unet, self._dtype)
        units = flat_units(unet)
        texts = Texts.of(conditions, self._dtype)
        self._model = Model(
            unet,
            units,
            texts,
            text_keys(unet, texts.embeds) if units is not None else {},
            None if guidance is None else guidance.to(self._dtype),
            any(has_hooks(module) for module in unet.modules()),
        )
        self._compiled: CompiledUNet | None = None
        if request.compile and units is not None:
            names = dict.fromkeys([site.name for site in part_sites(request.pipe.unet, "unet")] + [*self._sites])
            shapes = {name: site_shape(request.pipe.unet, name, self._size) for name in names}
            mode = request.compile if isinstance(request.compile, str) else None
            self._compiled = CompiledUNet(self._model, shapes, mode)
        self.joins = units is not None
        self._planned: tuple[list[Row], int, list[CallPlan]] = ([], 0, [])

    def run(self, rows: list[Row], inputs: dict[Key, Tensor], timestep: Tensor) -> dict[Key, Tensor]:
        """The UNet's output ``[C, h, w]`` of each row.

        Args:
            rows: a row that others copy from comes before them.
            inputs: ``[C, h, w]`` that each row reads.
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
                sample.to(self._dtype, memory_format=torch.channels_last),
                timestep[None],
                torch.tensor([row.text for row in plan.rows], device=latents.device),
            )
            if self._compiled is not None and plan.lockstep:
                output = self._compiled(call, plan)
            else:
                output = call_unet(self._model, call, plan, cache, trail)
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
            plans = plan_calls(rows, budget, self._order, self._positions, device, lockstep)
            self._planned = (rows, self._batch.rows, plans)
        return self._planned[2]

    def _positions(self, name: str) -> int:
        shape = site_shape(self._request.pipe.unet, name, self._size)
        return shape[0] if len(shape) == 2 else shape[1] * shape[2]


def call_rows(budget: int, compiled: bool) -> tuple[int, bool]:
    """Most rows of a call, and whether calls are laid out for compiled graphs, which have whole buckets of rows."""
    lockstep = compiled and budget >= BUCKET
    return budget // BUCKET * BUCKET if lockstep else budget, lockstep


def batch_size(request: UNetRequest) -> BatchSize:
    """The batch size for requests like this one."""
    size = (request.latents.shape[1], request.latents.shape[2])
    unet = request.pipe.unet
    return BatchSize(unet, cost_of(request), size, request.dtype or request.latents.dtype, request.max_batch)


def cost_of(request: UNetRequest) -> UNetCost:
    """What one row of a request's UNet costs."""
    size = (request.latents.shape[1], request.latents.shape[2])
    return unet_cost(request.pipe.unet, size, request.conditions["clean"].embeds.shape[0])
