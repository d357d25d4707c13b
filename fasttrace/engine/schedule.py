"""A scheduler of the engine's own: a copy of the user's, set to a number of steps, or refused with the reason."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from ..denoisers import Flow as Flow
from ..errors import ModelError


def new_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device, flow: Flow | None = None) -> Any:
    """A copy of the user's scheduler, set to a number of steps; the user's own stays as it is.

    Args:
        flow: of pipelines that sample by flow matching.

    Raises:
        ModelError: a scheduler of another family, one whose noise belongs to the whole batch, or one that cannot be set
            as its pipeline would set it.
    """
    name = type(scheduler).__name__
    scales = hasattr(scheduler, "scale_model_input") and hasattr(scheduler, "init_noise_sigma")
    if not (scales or (flow is not None and name.startswith("FlowMatch"))):
        raise ModelError(
            f"{name} is not a scheduler of this pipeline's family: use DDIM, PNDM, Euler, DPM-Solver or LCM with a "
            "UNet or PixArt, FlowMatchEulerDiscreteScheduler with SD3 or FLUX"
        )
    if hasattr(scheduler, "noise_sampler"):
        raise ModelError(
            f"{name} draws one noise for the whole batch, so runs can be neither paired nor forked: use "
            'DPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++"'
        )
    own = copy.deepcopy(scheduler)
    given = {} if flow is None else flow.settings(scheduler, num_inference_steps)
    unknown = given.keys() - inspect.signature(own.set_timesteps).parameters.keys()
    if unknown:
        raise ModelError(
            f"{name} cannot be given {' and '.join(sorted(unknown))}, as this pipeline does: use "
            "FlowMatchEulerDiscreteScheduler"
        )
    own.set_timesteps(num_inference_steps, device=device, **given)
    return own
