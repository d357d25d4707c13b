"""Tracing a denoiser: one request or many, by the fast engine or the oracle, and what many will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, NumericsError
from ...patch import PatchSet
from ...pipeline import Condition
from ..oracle.denoise import trace_oracle
from ..requests.denoise import PROTOCOLS, Added, DenoiserRequest, UNetRequest, denoiser_request, unet_request
from ..values import nan_rows

MOST_GROUPS = 8
"""Requests that take their steps together: more fill no batch better, and delay the first trace."""

__all__ = [
    "PROTOCOLS",
    "Added",
    "DenoiserRequest",
    "DenoiserTrace",
    "UNetPlanSummary",
    "UNetRequest",
    "UNetTrace",
    "denoiser_request",
    "plan_summary",
    "run_request",
    "trace_denoiser",
    "trace_unet",
    "trace_unet_many",
    "unet_request",
]


@dataclass(frozen=True)
class DenoiserTrace:
    """What a trace of a denoiser returns. Latents are ``[C, h, w]``, or ``[P, C]`` where the model packs them (FLUX).

    Attributes:
        clean: ``free``: final latents; ``teacher_forced``: the conditional model output ``[S, ...]`` at each of ``S``
            steps, before guidance.
        corrupted: as ``clean``.
        restored: ``[N, ...]``, or ``[N, S, ...]``: one per run, in the order of the patches.
        inputs: ``teacher_forced``: what the model read at each step in every run, ``[S, ...]``: the corrupted run's
            latents, scaled for the timestep. Else ``None``.
    """

    clean: Tensor
    corrupted: Tensor
    restored: Tensor
    inputs: Tensor | None = None


UNetTrace = DenoiserTrace


def trace_denoiser(
    pipe: Any,
    clean: Condition,
    corrupted: Condition,
    patches: Iterable[PatchSet],
    *,
    negative: Condition | None = None,
    sources: Mapping[str, Condition] | None = None,
    latents: Tensor | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    true_cfg_scale: float = 1.0,
    base: str | Sequence[str] = "corrupted",
    protocol: str = "free",
    eta: float = 0.0,
    engine: str = "fast",
    max_batch: int | None = None,
    compile: bool | str = False,
    dtype: torch.dtype | None = None,
) -> DenoiserTrace:
    """Denoise clean, corrupted, and once for each element of ``patches``, all from the same latents.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel`` (SD1.x, SD2.x, SDXL), ``SD3Transformer2DModel``,
            ``FluxTransformer2DModel`` or ``PixArtTransformer2DModel``; unchanged afterwards. Of it only ``.unet`` or
            ``.transformer`` and ``.scheduler`` are needed where conditions are given.
        clean: of the clean prompt, as the pipeline's ``encode_prompt`` makes it (`fasttrace.encoding.encode`).
        corrupted: of the corrupted prompt. Pooled text is part of a condition: to hold it clean, give the clean one's.
        patches: one run each: a `Patch`, or a tuple of them, applied in order.
        negative: of the unconditional branch; the pipeline's own empty prompt if not given. FLUX has such a branch only
            where this is given.
        sources: conditions of other prompts by the name that patches use.
        latents: as the denoiser reads them without the batch, unit normal: ``[C, h, w]``, or ``[P, C]`` where they are
            packed (FLUX); drawn from ``seed`` if not given, as the pipeline draws them.
        size: rows and columns of packed latents that are no square.
        seed: of the latents and of the scheduler's noise: ``torch.Generator().manual_seed(seed)``.
        num_inference_steps: denoising steps; some schedulers take one more.
        guidance_scale: of classifier-free guidance, where 1 or less runs the conditional branch alone; or an input of
            the model (FLUX.1-dev, LCM).
        true_cfg_scale: FLUX: of classifier-free guidance with ``negative``.
        base: ``"corrupted"`` or ``"clean"``: the run that is patched; or a key of ``sources``; or one such name for
            each run, which denoises many texts at once (their patches may be empty).
        protocol: ``"free"``: each run goes on with its own latents. ``"teacher_forced"``: every run sees the corrupted
            run's latents at every step.
        eta: of DDIM.
        engine: ``"fast"``, or ``"oracle"``: plain hooks, one run at a time.
        max_batch: most rows of one call.
        compile: run lockstep calls as one graph of ``torch.compile`` for each batch bucket and resolution, whatever the
            patches; the first call compiles. ``"reduce-overhead"`` and ``"max-autotune"`` make it a CUDA graph too (not
            measured; on a CPU torch leaves that out), ``"max-autotune-no-cudagraphs"`` only searches for kernels.
        dtype: what the fast engine computes in (``torch.bfloat16``, say), from weights cast for it; the pipeline's own
            dtype if not given. Latents and the scheduler keep the pipeline's.

    Raises:
        PatchError: wrong shapes, positions or steps out of range, an unknown source, base or protocol.
        SiteError: a site that the denoiser does not have.
        ModelError: a pipeline or engine that is not supported, or parts of a condition that are missing.
        NumericsError: a run that is not finite, by number.
    """
    request = denoiser_request(
        pipe, clean, corrupted, patches, negative=negative, sources=sources, latents=latents, size=size, seed=seed,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale,
        base=base, protocol=protocol, eta=eta, max_batch=max_batch, compile=compile, dtype=dtype,
    )  # fmt: skip
    return run_request(request, engine)


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
) -> DenoiserTrace:
    """`trace_denoiser` of a UNet, its conditions as separate tensors.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``; unchanged afterwards.
        clean_embeds: text states of the clean prompt, ``[T, D]``.
        corrupted_embeds: text states of the corrupted prompt, ``[T, D]``.
        negative_embeds: of the unconditional branch; the pipeline's own empty prompt if not given.
        clean_added: SDXL's pooled embedding and time ids. Needed for SDXL, refused elsewhere.
        corrupted_added: as given, else ``clean_added``.
        negative_added: as given, else the pipeline's own for the empty prompt.
        sources: text states of other prompts by the name that patches use: ``[T, D]``, or ``([T, D], added)``.

    All others, what is returned and what is raised are those of `trace_denoiser`.
    """
    request = unet_request(
        pipe, clean_embeds, corrupted_embeds, patches, latents, seed, num_inference_steps, guidance_scale,
        negative_embeds, clean_added, corrupted_added, negative_added, sources, base, protocol, eta, max_batch,
        compile, dtype,
    )  # fmt: skip
    return run_request(request, engine)


def run_request(request: DenoiserRequest, engine: str = "fast") -> DenoiserTrace:
    """Run a checked request; see `trace_denoiser`."""
    with torch.no_grad():
        trace = DenoiserTrace(*_engine(engine)(request))
    _check_finite(trace, request)
    return trace


def _engine(name: str) -> Callable[[DenoiserRequest], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    if name == "oracle":
        return trace_oracle
    if name == "fast":
        from .lockstep import trace_lockstep

        return trace_lockstep
    raise ModelError(f'engine={name!r}: expected "fast" or "oracle"')


def _check_finite(trace: DenoiserTrace, request: DenoiserRequest) -> None:
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
        forwards: forwards of one row that the plan needs; a row that joins at its site counts as a fraction.
        rows: rows in all calls, joined ones counted whole: the sum of what ``progress`` is told.
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
    requests: Sequence[DenoiserRequest],
    *,
    engine: str = "fast",
    progress: Callable[[int], None] | None = None,
) -> Iterator[DenoiserTrace]:
    """Run several checked requests, sharing batches between those that can; one trace each, in order.

    Requests share batches where they have the pipeline, steps, guidance and protocol in common.

    Args:
        requests: from `denoiser_request` or `unet_request`.
        engine: ``"fast"`` or ``"oracle"``.
        progress: called after each call with the number of rows it had.
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
            trace = DenoiserTrace(*output)
            _check_finite(trace, request)
            yield trace


def _batches(requests: Sequence[DenoiserRequest]) -> list[list[DenoiserRequest]]:
    """Neighbours that can take their steps together."""

    def shared(request: DenoiserRequest) -> tuple[Any, ...]:
        lengths = (request.latents.shape, request.dims, request.branches, request.cfg_scale)
        options = (request.protocol, request.eta, request.max_batch, request.compile, request.dtype)
        return (id(request.pipe), request.num_inference_steps, request.guidance_scale, *lengths, *options)

    batches: list[list[DenoiserRequest]] = []
    for request in requests:
        if batches and shared(batches[-1][0]) == shared(request) and len(batches[-1]) < MOST_GROUPS:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def plan_summary(requests: Sequence[DenoiserRequest]) -> UNetPlanSummary:
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
