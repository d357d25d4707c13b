"""Schedulers by name, on the pipeline's own noise schedule, without touching the pipeline."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import StudyError

# Name: class in diffusers, and settings that the name implies.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """A view on a pipeline with another scheduler; the pipeline itself is returned where nothing changes.

    Args:
        pipe: a diffusers pipeline.
        scheduler: ``None``, a name of `SCHEDULERS`, or a scheduler object. A named one takes over the betas, the
            prediction type and whatever else it shares with the pipeline's own.

    Raises:
        StudyError: an unknown name, or something that is no scheduler.
    """
    if scheduler is None:
        return pipe
    if isinstance(scheduler, str):
        if scheduler not in SCHEDULERS:
            raise StudyError(f"scheduler={scheduler!r}: expected one of {', '.join(SCHEDULERS)}, or a scheduler object")
        import diffusers

        name, settings = SCHEDULERS[scheduler]
        scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    if not callable(getattr(scheduler, "set_timesteps", None)):
        raise StudyError(f"scheduler={scheduler!r}: expected one of {', '.join(SCHEDULERS)}, or a scheduler object")
    view = copy.copy(pipe)
    # Past __setattr__, which would note the new scheduler in the configuration that the two share.
    vars(view)["scheduler"] = scheduler
    return view
