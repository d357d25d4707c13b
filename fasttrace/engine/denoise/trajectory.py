"""Schedulers over many runs at once: each run is a row, and rows can be selected, repeated and joined mid-way.

A scheduler of diffusers carries state between steps: earlier model outputs (PNDM, multistep solvers), a sample that a
later step needs, counters. All of it is either shared by every row (counters, schedules) or has the rows as its first
dimension, so one scheduler serves a whole lockstep batch, and a fork is a selection of rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..schedule import Flow, new_scheduler


class Trajectories:
    """Latents of many runs, with everything that the scheduler needs to take them a step further.

    Args:
        scheduler: of the pipeline; copied.
        num_inference_steps: as for ``set_timesteps``.
        latents: ``[C, h, w]``, or ``[P, C]`` where they are packed; unit normal, where every run starts.
        generator: CPU generator whose state every run's own generator starts from.
        rows: number of runs.
        eta: of DDIM; schedulers without it ignore it, as the pipelines do.
        flow: of pipelines that sample by flow matching.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        latents: Tensor,
        generator: torch.Generator,
        rows: int,
        eta: float,
        flow: Flow | None = None,
    ) -> None:
        self._scheduler = new_scheduler(scheduler, num_inference_steps, latents.device, flow)
        self.timesteps: Tensor = self._scheduler.timesteps
        # Flow matching starts from noise of unit variance, and its models read latents as they are.
        started = latents * getattr(self._scheduler, "init_noise_sigma", 1.0)
        self.latents = torch.stack([started] * rows)
        self._generators = [_clone(generator) for _ in range(rows)]
        takes = set(inspect.signature(self._scheduler.step).parameters)
        self._draws = "generator" in takes
        self._extra = {"eta": eta} if "eta" in takes else {}

    def __len__(self) -> int:
        return self.latents.shape[0]

    def model_input(self, step: int) -> Tensor:
        """Latents as the denoiser reads them at a step, ``[rows, ...]``.

        Must be called once before each `advance`: some schedulers note here which step they are at.
        """
        scale = getattr(self._scheduler, "scale_model_input", None)
        scaled: Tensor = self.latents if scale is None else scale(self.latents, self.timesteps[step])
        return scaled

    def advance(self, step: int, model_output: Tensor) -> None:
        """One step of the scheduler, from the guided model output ``[rows, ...]``."""
        extra: dict[str, Any] = dict(self._extra)
        if self._draws:
            # A list draws each row from its own generator, so that rows do not depend on their batch mates.
            extra["generator"] = self._generators if len(self) > 1 else self._generators[0]
        result = self._scheduler.step(model_output, self.timesteps[step], self.latents, **extra, return_dict=False)
        self.latents = result[0]

    def select(self, rows: Sequence[int]) -> Trajectories:
        """A copy that has these rows, in this order; a row may be taken several times, which forks it."""
        other = copy.copy(self)
        index = torch.as_tensor(rows, dtype=torch.long, device=self.latents.device)
        other.latents = self.latents[index]
        other._generators = [_clone(self._generators[row]) for row in rows]
        other._scheduler = copy.copy(self._scheduler)
        for name, value in vars(self._scheduler).items():
            setattr(other._scheduler, name, _select_rows(value, index, self.latents.shape))
        return other


def _select_rows(value: Any, index: Tensor, shape: torch.Size) -> Any:
    """State with the rows selected: tensors shaped like the latents, alone or in lists; anything else as it is."""
    if isinstance(value, Tensor):
        return value[index] if value.shape == shape else value
    if isinstance(value, list):
        return [_select_rows(item, index, shape) for item in value]
    return value


def _clone(generator: torch.Generator) -> torch.Generator:
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other
