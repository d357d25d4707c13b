"""Tracing a UNet: one request or many, by the fast engine or the oracle, and what many will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, NumericsError
from ...patch import PatchSet
from ..oracle.denoise import trace_unet_oracle
from ..requests.denoise import PROTOCOLS, Added, UNetRequest, unet_request
from ..values import nan_rows

MOST_GROUPS = 8
"""Requests that take their steps together: more fill no batch better, and delay the first trace."""

__all__ = [
    "PROTOCOLS",
    "Added",
    "UNetPlanSummary",
    "UNetRequest",
    "UNetTrace",
    "plan_summary",
    "run_request",
    "trace_unet",
    "trace_unet_many",
    "unet_request",
]


@dataclass(frozen=True)
class UNetTrace:
    """What a UNet trace returns.

    Attributes:
        clean: ``free``: final latents ``[C, h, w]``; ``teacher_forced``: the conditional model output ``[S, C, h, w]``
            at each of ``S`` steps, before guidance.
        corrupted: as ``clean``.
        restored: ``[N, C, h, w]``, or ``[N, S, C, h, w]``: one per run, in the order of the patches.
        inputs: ``teacher_forced``: what the UNet read at each step in every run, ``[S, C, h, w]``: the corrupted run's
            latents, scaled for the timestep. Else ``None``.
    """

    clean: Tensor
    corrupted: Tensor
    restored: Tensor
    inputs: Tensor | None = None


def trace_unet(
    pipe: Any,
    clean_embeds: Tensor,
    corrupted_embeds: Tensor,
    patches: Iterable[PatchSet],
    *,
    latents: Tensor | None = None,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    negative_embeds: Tensor | None = None,
    clean_added: Added | None = None,
    corrupted_added: Added | None = None,
    negative_added: Added | None = None,
    sources: Mapping[str, Any] | None = None,
    base: str | Sequence[str] = "corrupted",
    protocol: str = "free",
    eta: float = 0.0,
    engine: str = "fast",
    max_batch: int | None = None,
    compile: bool | str = False,
    dtype: torch.dtype | None = None,
) -> UNetTrace:
    """Denoise clean, corrupted, and once for each element of ``patches``, all from the same latents.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``; unchanged afterwards.
        clean_embeds: text states of the clean prompt, ``[T, D]``.
        corrupted_embeds: text states of the corrupted prompt, ``[T, D]``.
        patches: one run each: a `Patch`, or a tuple of them, applied in order.
        latents: ``[C, h, w]``, unit normal; drawn from ``seed`` if not given, as the pipeline draws them.
        seed: of the latents and of the scheduler's noise: ``torch.Generator().manual_seed(seed)``.
        num_inference_steps: denoising steps; some schedulers take one more.
        guidance_scale: 1 or less runs the conditional branch alone.
        negative_embeds: of the unconditional branch; the pipeline's own empty prompt if not given.
        clean_added: SDXL's pooled embedding and time ids. Needed for SDXL, refused elsewhere.
        corrupted_added: as given, else ``clean_added``.
        negative_added: as given, else the pipeline's own for the empty prompt.
        sources: text states of other prompts by the name that patches use: ``[T, D]``, or ``([T, D], added)``.
        base: ``"corrupted"`` or ``"clean"``: the run that is patched; or a key of ``sources``; or one such name for
            each run, which denoises many texts at once (their patches may be empty).
        protocol: ``"free"``: each run goes on with its own latents. ``"teacher_forced"``: every run sees the corrupted
            run's latents at every step.
        eta: of DDIM.
        engine: ``"fast"``, or ``"oracle"``: plain hooks, one run at a time.
        max_batch: most rows of one UNet call.
        compile: run lockstep calls as one graph of ``torch.compile`` for each batch bucket and resolution, whatever the
            patches; the first call compiles. ``"reduce-overhead"`` and ``"max-autotune"`` make it a CUDA graph too (not
            measured; on a CPU torch leaves that out), ``"max-autotune-no-cudagraphs"`` only searches for kernels.
        dtype: what the fast engine's UNet computes in (``torch.bfloat16``, say), from weights cast for it; the
            pipeline's own dtype if not given. Latents and the scheduler keep the pipeline's.

    Raises:
        PatchError: wrong shapes, positions or steps out of range, an unknown source, base or protocol.
        SiteError: a site that the UNet does not have.
        ModelError: a pipeline or engine that is not supported, or missing added conditions.
        NumericsError: a run that is not finite, by number.
    """
    request = unet_request(
        pipe, clean_embeds, corrupted_embeds, patches, latents, seed, num_inference_steps, guidance_scale,
        negative_embeds, clean_added, corrupted_added, negative_added, sources, base, protocol, eta, max_batch,
        compile, dtype,
    )  # fmt: skip
    return run_request(request, engine)


def run_request(request: UNetRequest, engine: str = "fast") -> UNetTrace:
    """Run a checked request; see `trace_unet`."""
    with torch.no_grad():
        trace = UNetTrace(*_engine(engine)(request))
    _check_finite(trace, request)
    return trace


def _engine(name: str) -> Callable[[UNetRequest], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    if name == "oracle":
        return trace_unet_oracle
    if name == "fast":
        from .lockstep import trace_unet_lockstep

        return trace_unet_lockstep
    raise ModelError(f'engine={name!r}: expected "fast" or "oracle"')


def _check_finite(trace: UNetTrace, request: UNetRequest) -> None:
    named = {"clean": trace.clean, "corrupted": trace.corrupted}
    bad = [name for name, value in named.items() if not bool(torch.isfinite(value).all())]
    rows = nan_rows(trace.restored)
    if bad or rows:
        which = bad + [f"run {row} ({', '.join(p.site for p in request.runs[row]) or 'no patch'})" for row in rows[:3]]
        raise NumericsError(
            f"{len(bad) + len(rows)} runs are not finite in {request.latents.dtype}: {'; '.join(which)}"
            f"{', ...' if len(rows) > 3 else ''}; load the pipeline in float32 or bfloat16"
        )


@dataclass(frozen=True)
class UNetPlanSummary:
    """What `trace_unet_many` will do for some requests.

    Attributes:
        runs: distinct denoising runs: clean, corrupted, sources, and one for each patched run that is not its base.
        forwards: UNet forwards of one row that the plan needs; a row that joins at its site counts as a fraction.
        rows: rows in all UNet calls, joined ones counted whole: the sum of what ``progress`` is told.
        naive_shared: forwards with clean and corrupted once and one whole run for each patched run.
        naive_three: forwards with clean, corrupted and restored run for each patched run: the common practice.
        tflop: of ``forwards``, in 10^12 operations (a multiply and an add are two).
        memory_bytes: expected peak beside the weights.
    """

    runs: int
    forwards: float
    rows: int
    naive_shared: int
    naive_three: int
    tflop: float
    memory_bytes: int


def trace_unet_many(
    requests: Sequence[UNetRequest],
    *,
    engine: str = "fast",
    progress: Callable[[int], None] | None = None,
) -> Iterator[UNetTrace]:
    """Run several checked requests, sharing batches between those that can; one trace each, in order.

    Requests share batches where they have the pipeline, steps, guidance and protocol in common.

    Args:
        requests: from `fasttrace.engine.denoise.trace.unet_request`.
        engine: ``"fast"`` or ``"oracle"``.
        progress: called after each UNet call with the number of rows it had.
    """
    told = progress or (lambda rows: None)
    for group in _batches(requests) if engine == "fast" else [[request] for request in requests]:
        if engine != "fast":
            yield run_request(group[0], engine)
            told(plan_summary(group).rows)
            continue
        from .lockstep import trace_groups

        with torch.no_grad():
            outputs = trace_groups(group, told)
        for request, output in zip(group, outputs, strict=True):
            trace = UNetTrace(*output)
            _check_finite(trace, request)
            yield trace


def _batches(requests: Sequence[UNetRequest]) -> list[list[UNetRequest]]:
    """Neighbours that can take their steps together."""

    def shared(request: UNetRequest) -> tuple[Any, ...]:
        lengths = (request.latents.shape, request.conditions["clean"].embeds.shape, request.branches)
        options = (request.protocol, request.eta, request.max_batch, request.compile, request.dtype)
        return (id(request.pipe), request.num_inference_steps, request.guidance_scale, *lengths, *options)

    batches: list[list[UNetRequest]] = []
    for request in requests:
        if batches and shared(batches[-1][0]) == shared(request) and len(batches[-1]) < MOST_GROUPS:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def plan_summary(requests: Sequence[UNetRequest]) -> UNetPlanSummary:
    """Count runs, forwards, operations and memory of `trace_unet_many` on these requests; no forward pass."""
    from .summary import count

    counts = [count(batch) for batch in _batches(requests)]
    once = [(2 + len(request.runs)) * request.steps * request.branches for request in requests]
    anew = [3 * len(request.runs) * request.steps * request.branches for request in requests]
    return UNetPlanSummary(
        runs=sum(one[0] for one in counts),
        forwards=sum(one[1] for one in counts),
        rows=sum(one[2] for one in counts),
        naive_shared=sum(once),
        naive_three=sum(anew),
        tflop=sum(one[3] for one in counts) / 1e12,
        memory_bytes=max((one[4] for one in counts), default=0),
    )
