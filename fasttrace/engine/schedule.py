"""A scheduler of the engine's own: a copy of the user's, set to a number of steps, or refused with the reason."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import ModelError


def new_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device) -> Any:
    """A copy of the user's scheduler, set to a number of steps; the user's own stays as it is.

    Raises:
        ModelError: a scheduler of another family, or one whose noise belongs to the whole batch.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "scale_model_input") or not hasattr(scheduler, "init_noise_sigma"):
        raise ModelError(
            f"{name} is not a scheduler of Stable Diffusion's family: use DDIM, PNDM, Euler, DPM-Solver or LCM"
        )
    if hasattr(scheduler, "noise_sampler"):
        raise ModelError(
            f"{name} draws one noise for the whole batch, so runs can be neither paired nor forked: use "
            'DPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++"'
        )
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps, device=device)
    return own
