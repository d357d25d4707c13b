"""Running rows: planned into UNet calls that fit in memory, one after another, on a shadow of the user's UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pipeline import Condition
from .oracle import timestep_condition
from .shadow import shadow_of
from .unet_forward import CallInputs, Texts, hooked_forward
from .unet_patch import Cache
from .unet_plan import CallPlan, plan_calls, site_order
from .unet_request import UNetRequest, site_resolution
from .unet_runs import Key, Row

DEFAULT_BATCH = 64


class UNetCalls:
    """The UNet of some requests, ready to run rows.

    Attributes:
        joins: whether rows may join a call at their site.
        texts_of: for each request the row of each of its conditions in the table of all conditions.
    """

    def __init__(self, requests: Sequence[UNetRequest], progress: Callable[[int], None] | None = None) -> None:
        request = self._request = requests[0]
        self._progress = progress or (lambda rows: None)
        self._unet = shadow_of(request.pipe.unet)
        self._order = site_order(request.pipe.unet)
        self._guidance = timestep_condition(request)
        self._sites = {name: site for one in requests for name, site in one.sites.items()}
        self._budget = request.max_batch or DEFAULT_BATCH
        self.joins = False
        conditions: list[Condition] = []
        self.texts_of: list[dict[str | None, int]] = []
        for one in requests:
            named: dict[str | None, Condition] = {**one.conditions}
            if one.negative is not None:
                named[None] = one.negative
            self.texts_of.append({name: len(conditions) + place for place, name in enumerate(named)})
            conditions += named.values()
        self._texts = Texts.of(conditions, request.latents.dtype)
        self._planned: tuple[list[Row], list[CallPlan]] = ([], [])

    def run(self, rows: list[Row], inputs: dict[Key, Tensor], timesteps: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """The UNet's output ``[C, h, w]`` of each row.

        Args:
            rows: a row that others copy from comes before them.
            inputs: ``[C, h, w]`` that each row reads.
            timesteps: of each row.
        """
        outputs: dict[Key, Tensor] = {}
        cache: Cache = {}
        for plan in self._plans(rows):
            roots = plan.rows[: plan.roots]
            call = CallInputs(
                torch.stack([inputs[row.key] for row in roots]),
                torch.stack([timesteps[row.key] for row in roots]),
                torch.tensor([row.text for row in plan.rows], device=self._request.latents.device),
                self._texts,
                self._guidance,
            )
            output = hooked_forward(self._unet, call, plan, cache)
            outputs |= {row.key: value for row, value in zip(plan.rows, output, strict=True)}
            for spent in plan.spent:
                del cache[spent]
            self._progress(len(plan.rows))
        return outputs

    def _plans(self, rows: list[Row]) -> list[CallPlan]:
        """Plans of the same rows are kept: most steps of ``free`` repeat the one before."""
        if rows != self._planned[0]:
            plans = plan_calls(rows, self._budget, self._order, self._positions, self._request.latents.device)
            self._planned = (rows, plans)
        return self._planned[1]

    def _positions(self, name: str) -> int:
        size = (self._request.latents.shape[1], self._request.latents.shape[2])
        height, width = site_resolution(self._request.pipe.unet, self._sites[name], size)
        return height * width
