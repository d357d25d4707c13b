"""What tracing costs on one's own pipeline and machine, and where the time goes."""

from __future__ import annotations

from typing import Any

from ..errors import StudyError
from .result import Profile


def profile(
    pipe: Any,
    sites: Any = "unet",
    *,
    model: str = "pipeline",
    steps: int = 20,
    prompts: int = 1,
    seeds: int = 1,
    budget: float = 60.0,
) -> Profile:
    """Measure what tracing costs on a pipeline: time, operations, bytes and memory, by kind of site and by stage.

    Args:
        pipe: a diffusers pipeline; unchanged afterwards.
        sites: UNet sites to sweep, as for `fasttrace.select_sites`.
        model: its name, for the tables.
        steps, prompts, seeds: of the study that is estimated.
        budget: seconds to spend, about; a model whose single call takes longer is measured by fewer calls.

    Raises:
        SiteError: a pattern that matches nothing.
        StudyError: no UNet site among the chosen ones, or a number that is not positive.
    """
    from ..pipeline import check_traceable
    from ..sites import discover_sites, select_sites
    from . import measure
    from .ceilings import machine_name, measure_ceilings
    from .overhead import STEPS, patching_overhead
    from .savings import savings, text_share
    from .stages import stage_costs
    from .text_sweep import text_sweep

    for name, value in (("steps", steps), ("prompts", prompts), ("seeds", seeds), ("budget", budget)):
        if not value > 0:
            raise StudyError(f"{name}={value}: expected a positive number")
    check_traceable(pipe)
    chosen = [site for site in select_sites(discover_sites(pipe), sites) if site.part == "unet"]
    if not chosen:
        raise StudyError(
            f'sites={sites!r} has no site of the UNet: expected "unet" or globs such as "unet.up_blocks.*"'
        )
    ceilings = measure_ceilings(pipe.unet.device, pipe.unet.dtype)
    call = measure.UNetCaller(pipe)
    batches = measure.batch_curve(call, budget / 2)
    best = min(batches, key=lambda point: point.per_sample)
    rounds = 3 if best.seconds * 3 < budget / 4 else 1
    kinds = measure.kind_costs(call, best.batch, ceilings, rounds)
    rows = min(8, len(chosen))
    predicted = 2 * (rows + 2) * 2 * STEPS * best.per_sample
    overhead = patching_overhead(pipe, chosen, rows, 3) if 4 * predicted < budget / 2 else None
    stages = stage_costs(pipe, ceilings)
    return Profile(
        model,
        f"{machine_name(pipe.unet.device)}, {str(pipe.unet.dtype).removeprefix('torch.')}",
        ceilings,
        kinds,
        batches,
        sum(parameter.nbytes for parameter in pipe.unet.parameters()),
        stages,
        savings(pipe, chosen, steps),
        text_share(pipe),
        text_sweep(pipe),
        overhead,
        steps,
        prompts,
        seeds,
    )
