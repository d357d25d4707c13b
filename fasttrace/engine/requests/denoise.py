"""A denoiser trace that has been checked: its conditions, latents and runs, on the model's device and in its dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...denoisers import Denoiser, Flow, Size, denoiser_of
from ...errors import ModelError, PatchError
from ...models.description import Description
from ...models.heads import with_heads
from ...models.registry import description_of
from ...models.unit import Dims
from ...patch import Patch, PatchSet, as_runs
from ...pipeline import Condition, check_traceable, default_time_ids, encode_negative, needs_added
from ...sites import Site, find_sites
from ..schedule import new_scheduler

PROTOCOLS = ("free", "teacher_forced")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of ``torch.compile``. The second and third capture CUDA graphs on a GPU, and do not on a CPU."""

Added = Mapping[str, Tensor] | tuple[Tensor, Tensor]
"""SDXL's added conditions: ``{"text_embeds": [P], "time_ids": [6]}``, or the two tensors in that order."""


@dataclass(frozen=True)
class DenoiserRequest:
    """A trace that has been checked: what both engines read.

    Attributes:
        denoiser: of the user's pipeline.
        runs: patches of each run; positions and steps are indices or ``None``.
        sites: the sites that the patches name.
        conditions: ``"clean"``, ``"corrupted"``, and the further sources, on the model's device and in its dtype.
        negative: condition of the unconditional branch; ``None`` without classifier-free guidance.
        latents: as the model reads them, ``[C, h, w]`` or ``[P, C]``, unit normal.
        size: their height and width; of packed ones, in patches.
        generator_state: of the CPU generator that every run's scheduler noise is drawn from.
        num_inference_steps: as given to ``scheduler.set_timesteps``; the number of steps may differ from it.
        steps: ``len(scheduler.timesteps)``.
        guidance_scale: as given: of classifier-free guidance, or an input of the model.
        cfg_scale: by how much the conditional output is taken further from the unconditional one.
        bases: for each run the name of the condition that it is denoised with: the run that is patched.
        protocol: ``"free"`` or ``"teacher_forced"``.
        eta: of DDIM.
        max_batch: most rows of one call, or ``None`` for the engine's own choice.
        compile: run the model as one compiled graph where the plan is in lockstep; one of `COMPILE_MODES` names how.
        dtype: what the model computes in, where not in its own dtype; latents keep theirs.
    """

    denoiser: Denoiser
    runs: list[tuple[Patch, ...]]
    sites: dict[str, Site]
    conditions: dict[str, Condition]
    negative: Condition | None
    latents: Tensor
    size: Size
    generator_state: Tensor
    num_inference_steps: int
    steps: int
    guidance_scale: float
    cfg_scale: float
    bases: list[str]
    protocol: str
    eta: float
    max_batch: int | None
    compile: bool | str = False
    dtype: torch.dtype | None = None

    @property
    def pipe(self) -> Any:
        """The user's pipeline."""
        return self.denoiser.pipe

    @property
    def description(self) -> Description:
        """The units of the user's model."""
        return _described(self.denoiser)

    @property
    def dims(self) -> Dims:
        """What shapes and costs depend on."""
        return Dims(*self.size, self.conditions["clean"].embeds.shape[0])

    @property
    def flow(self) -> Flow | None:
        """Of pipelines that sample by flow matching."""
        return self.denoiser.flow(self.size)

    @property
    def branches(self) -> int:
        """Rows of the model for one run: 2 with classifier-free guidance (unconditional first), else 1."""
        return 1 if self.negative is None else 2

    def new_generator(self) -> torch.Generator:
        """A generator at the state from which every run draws its scheduler noise."""
        generator = torch.Generator()
        generator.set_state(self.generator_state)
        return generator


UNetRequest = DenoiserRequest


def _described(denoiser: Denoiser) -> Description:
    description = description_of(denoiser.model)
    assert description is not None, "only models that have a description have an adapter"
    return description


def denoiser_request(
    pipe: Any,
    clean: Condition,
    corrupted: Condition,
    patches: Iterable[PatchSet],
    *,
    negative: Condition | None = None,
    sources: Mapping[str, Condition] | None = None,
    latents: Tensor | None = None,
    size: Size | None = None,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    true_cfg_scale: float = 1.0,
    base: str | Sequence[str] = "corrupted",
    protocol: str = "free",
    eta: float = 0.0,
    max_batch: int | None = None,
    compile: bool | str = False,
    dtype: torch.dtype | None = None,
) -> DenoiserRequest:
    """Check the arguments of `trace_denoiser` and move what they hold to the model's device and dtype."""
    denoiser = denoiser_of(pipe)
    if protocol not in PROTOCOLS:
        raise PatchError(f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if compile not in (True, False, *COMPILE_MODES):
        raise PatchError(f"compile={compile!r}: expected True, False or one of {', '.join(COMPILE_MODES)}")
    if num_inference_steps < 1:
        raise PatchError(f"num_inference_steps={num_inference_steps}: expected at least 1")
    if max_batch is not None and max_batch < 1:
        raise PatchError(f"max_batch={max_batch}: expected at least 1, or None for the engine's own choice")
    device, own_dtype = denoiser.model.device, denoiser.model.dtype
    conditions = {"clean": clean, "corrupted": corrupted}
    for name, condition in (sources or {}).items():
        if name in conditions:
            raise PatchError(f"sources has the name {name!r}, which means this trace's own run: choose another")
        conditions[name] = condition
    cfg_scale = denoiser.cfg_scale(guidance_scale, true_cfg_scale, negative is not None)
    every: dict[str | None, Condition] = dict(conditions.items())
    if cfg_scale > 1:
        every[None] = denoiser.negative(clean) if negative is None else negative
    for what, condition in every.items():
        denoiser.check(what or "negative", condition)
    lengths = {what or "negative": list(condition.embeds.shape) for what, condition in every.items()}
    if len(set(map(tuple, lengths.values()))) != 1:
        raise PatchError(f"text states of different shapes, {lengths}: expected the same [T, D] for all")
    masked = any(condition.mask is not None for condition in every.values())
    moved = {name: _moved(condition, masked, device, own_dtype) for name, condition in every.items()}

    generator = torch.Generator().manual_seed(seed)
    if latents is None:
        drawn = torch.randn(1, *denoiser.drawn_shape(), generator=generator, dtype=own_dtype)[0]
        latents, size = denoiser.packed(drawn), None
    size = denoiser.size(latents, size)
    steps = len(new_scheduler(pipe.scheduler, num_inference_steps, device, denoiser.flow(size)).timesteps)

    runs = as_runs(patches)
    bases = [base] * len(runs) if isinstance(base, str) else list(base)
    unknown = [name for name in bases if name not in conditions]
    if unknown or len(bases) != len(runs):
        raise PatchError(
            f"base={base!r}: expected one of {', '.join(conditions)}, or one such name for each of the {len(runs)} runs"
        )
    sites = find_sites(pipe, (patch.site for run in runs for patch in run))
    model, dims = with_heads(_described(denoiser), sites), Dims(*size, clean.embeds.shape[0])
    for patch in (patch for run in runs for patch in run):
        site = sites[patch.site]
        if site.part != denoiser.part:
            raise PatchError(f"{patch.site} is a site of {site.part}: trace it with trace_text, or with a Study")
        patch.within(model.positions(patch.site, dims), steps, set(conditions))
        if patch.branch == "uncond" and (cfg_scale <= 1 or protocol == "teacher_forced"):
            scales = f"guidance_scale={guidance_scale} has none"
            why = "the protocol scores the conditional output" if cfg_scale > 1 else scales
            raise PatchError(f'{patch.site}: branch="uncond" would change nothing: {why}; use branch="cond"')
    return DenoiserRequest(
        denoiser, runs, sites, {name: moved[name] for name in conditions}, moved.get(None),
        latents.to(device, own_dtype), size, generator.get_state(), num_inference_steps, steps, guidance_scale,
        cfg_scale, bases, protocol, eta, max_batch, compile, dtype,
    )  # fmt: skip


def _moved(condition: Condition, masked: bool, device: torch.device, dtype: torch.dtype) -> Condition:
    """On the model's device, with a mask where others have one."""
    moved = condition.to(device, dtype)
    if not masked or moved.mask is not None:
        return moved
    every = torch.ones(len(moved.embeds), dtype=torch.long, device=device)
    return Condition(moved.embeds, moved.pooled, moved.time_ids, every)


def unet_request(
    pipe: Any,
    clean_embeds: Tensor,
    corrupted_embeds: Tensor,
    patches: Iterable[PatchSet],
    latents: Tensor | None,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    negative_embeds: Tensor | None,
    clean_added: Added | None,
    corrupted_added: Added | None,
    negative_added: Added | None,
    sources: Mapping[str, Any] | None,
    base: str | Sequence[str],
    protocol: str,
    eta: float,
    max_batch: int | None,
    compile: bool | str = False,
    dtype: torch.dtype | None = None,
) -> DenoiserRequest:
    """The request of `trace_unet`'s arguments."""
    check_traceable(pipe)
    clean = _condition(pipe, "clean_embeds", clean_embeds, clean_added)
    added = corrupted_added if corrupted_added is not None else clean_added
    corrupted = _condition(pipe, "corrupted_embeds", corrupted_embeds, added)
    others = dict[str, Condition]()
    for name, value in (sources or {}).items():
        embeds, own = value if isinstance(value, tuple) else (value, clean_added)
        others[name] = _condition(pipe, f"sources[{name!r}]", embeds, own)
    guided = guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    return denoiser_request(
        pipe,
        clean,
        corrupted,
        patches,
        negative=_negative(pipe, negative_embeds, negative_added, clean) if guided else None,
        sources=others,
        latents=latents,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        base=base,
        protocol=protocol,
        eta=eta,
        max_batch=max_batch,
        compile=compile,
        dtype=dtype,
    )


def _condition(pipe: Any, what: str, embeds: Tensor, added: Added | None) -> Condition:
    if not needs_added(pipe):
        if added is not None:
            raise ModelError(f"{what} came with added conditions, which {type(pipe).__name__} does not take")
        return Condition(embeds)
    if added is None:
        raise ModelError(
            f'{what}: SDXL needs added conditions; give clean_added={{"text_embeds": pooled [P], "time_ids": [6]}}'
        )
    pooled, time_ids = (added["text_embeds"], added["time_ids"]) if isinstance(added, Mapping) else added
    return Condition(embeds, pooled.reshape(-1), time_ids.reshape(-1))


def _negative(pipe: Any, embeds: Tensor | None, added: Added | None, clean: Condition) -> Condition:
    """As given; the pipeline's own for the empty prompt where something is not."""
    own = encode_negative(pipe) if embeds is None or (needs_added(pipe) and added is None) else None
    if embeds is None:
        assert own is not None
        embeds = own.embeds
    if added is None and own is not None and own.pooled is not None:
        time_ids = clean.time_ids if clean.time_ids is not None else default_time_ids(pipe)
        added = (own.pooled, time_ids)
    return _condition(pipe, "negative_embeds", embeds, added)
