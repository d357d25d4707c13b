"""A UNet trace that has been checked: its conditions, latents and runs, on the UNet's device and in its dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, PatchError
from ...models.unet import describe_unet
from ...models.unit import Dims
from ...patch import Patch, PatchSet, as_runs
from ...pipeline import Condition, check_traceable, default_time_ids, encode_negative, latent_shape, needs_added
from ...sites import Site, find_sites
from ..schedule import new_scheduler

PROTOCOLS = ("free", "teacher_forced")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of ``torch.compile``. The second and third capture CUDA graphs on a GPU, and do not on a CPU."""

Added = Mapping[str, Tensor] | tuple[Tensor, Tensor]
"""SDXL's added conditions: ``{"text_embeds": [P], "time_ids": [6]}``, or the two tensors in that order."""


@dataclass(frozen=True)
class UNetRequest:
    """A UNet trace that has been checked: what both engines read.

    Attributes:
        pipe: the user's pipeline.
        runs: patches of each run; positions and steps are indices or ``None``.
        sites: the sites that the patches name.
        conditions: ``"clean"``, ``"corrupted"``, and the further sources, on the UNet's device and in its dtype.
        negative: condition of the unconditional branch; ``None`` without guidance.
        latents: ``[C, h, w]``, unit normal.
        generator_state: of the CPU generator that every run's scheduler noise is drawn from.
        num_inference_steps: as given to ``scheduler.set_timesteps``; the number of steps may differ from it.
        steps: ``len(scheduler.timesteps)``.
        guidance_scale: of classifier-free guidance.
        bases: for each run the name of the condition that it is denoised with: the run that is patched.
        protocol: ``"free"`` or ``"teacher_forced"``.
        eta: of DDIM.
        max_batch: most rows of one UNet call, or ``None`` for the engine's own choice.
        compile: run the UNet as one compiled graph where the plan is in lockstep; one of `COMPILE_MODES` names how.
        dtype: what the UNet computes in, where not in its own dtype; latents keep theirs.
    """

    pipe: Any
    runs: list[tuple[Patch, ...]]
    sites: dict[str, Site]
    conditions: dict[str, Condition]
    negative: Condition | None
    latents: Tensor
    generator_state: Tensor
    num_inference_steps: int
    steps: int
    guidance_scale: float
    bases: list[str]
    protocol: str
    eta: float
    max_batch: int | None
    compile: bool | str = False
    dtype: torch.dtype | None = None

    @property
    def dims(self) -> Dims:
        """What shapes and costs depend on."""
        return Dims(self.latents.shape[1], self.latents.shape[2], self.conditions["clean"].embeds.shape[0])

    @property
    def branches(self) -> int:
        """Rows of the UNet for one run: 2 with guidance (unconditional first), else 1."""
        return 1 if self.negative is None else 2

    def new_generator(self) -> torch.Generator:
        """A generator at the state from which every run draws its scheduler noise."""
        generator = torch.Generator()
        generator.set_state(self.generator_state)
        return generator


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
) -> UNetRequest:
    """Check the arguments of `trace_unet` and move what they hold to the UNet's device and dtype."""
    check_traceable(pipe)
    if protocol not in PROTOCOLS:
        raise PatchError(f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if compile not in (True, False, *COMPILE_MODES):
        raise PatchError(f"compile={compile!r}: expected True, False or one of {', '.join(COMPILE_MODES)}")
    if num_inference_steps < 1:
        raise PatchError(f"num_inference_steps={num_inference_steps}: expected at least 1")
    if max_batch is not None and max_batch < 1:
        raise PatchError(f"max_batch={max_batch}: expected at least 1, or None for the engine's own choice")
    unet = pipe.unet
    device, own_dtype = unet.device, unet.dtype
    conditions = {"clean": _condition(pipe, "clean_embeds", clean_embeds, clean_added)}
    conditions["corrupted"] = _condition(
        pipe, "corrupted_embeds", corrupted_embeds, corrupted_added if corrupted_added is not None else clean_added
    )
    for name, value in (sources or {}).items():
        if name in conditions:
            raise PatchError(f"sources has the name {name!r}, which means this trace's own run: choose another")
        embeds, added = value if isinstance(value, tuple) else (value, clean_added)
        conditions[name] = _condition(pipe, f"sources[{name!r}]", embeds, added)
    lengths = {name: condition.embeds.shape for name, condition in conditions.items()}
    if len(set(lengths.values())) != 1:
        raise PatchError(f"text states of different shapes, {lengths}: expected the same [T, D] for all")
    guided = guidance_scale > 1 and unet.config.time_cond_proj_dim is None
    negative = _negative(pipe, negative_embeds, negative_added, conditions["clean"]) if guided else None

    generator = torch.Generator().manual_seed(seed)
    if latents is None:
        latents = torch.randn(1, *latent_shape(pipe), generator=generator, dtype=own_dtype)[0]
    elif latents.ndim != 3 or latents.shape[0] != unet.config.in_channels:
        raise PatchError(f"latents has shape {list(latents.shape)}: expected [{unet.config.in_channels}, h, w]")
    steps = len(new_scheduler(pipe.scheduler, num_inference_steps, device).timesteps)

    runs = as_runs(patches)
    bases = [base] * len(runs) if isinstance(base, str) else list(base)
    unknown = [name for name in bases if name not in conditions]
    if unknown or len(bases) != len(runs):
        raise PatchError(
            f"base={base!r}: expected one of {', '.join(conditions)}, or one such name for each of the {len(runs)} runs"
        )
    sites = find_sites(pipe, (patch.site for run in runs for patch in run))
    model, dims = describe_unet(unet), Dims(latents.shape[1], latents.shape[2])
    for patch in (patch for run in runs for patch in run):
        site = sites[patch.site]
        if site.part != "unet":
            raise PatchError(f"{patch.site} is a site of {site.part}: trace it with trace_text, or with a Study")
        patch.within(model.positions(patch.site, dims), steps, set(conditions))
        if patch.branch == "uncond" and (not guided or protocol == "teacher_forced"):
            why = (
                "the protocol scores the conditional output" if guided else f"guidance_scale={guidance_scale} has none"
            )
            raise PatchError(f'{patch.site}: branch="uncond" would change nothing: {why}; use branch="cond"')
    moved = {name: condition.to(device, own_dtype) for name, condition in conditions.items()}
    return UNetRequest(
        pipe, runs, sites, moved, None if negative is None else negative.to(device, own_dtype),
        latents.to(device, own_dtype), generator.get_state(), num_inference_steps, steps, guidance_scale, bases,
        protocol, eta, max_batch, compile, dtype,
    )  # fmt: skip


def _condition(pipe: Any, what: str, embeds: Tensor, added: Added | None) -> Condition:
    width = pipe.unet.config.cross_attention_dim
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != width:
        shape = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise PatchError(f"{what} has shape {shape}: expected [T, {width}]")
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
    own = encode_negative(pipe) if embeds is None or (needs_added(pipe) and added is None) else None
    if embeds is None:
        assert own is not None
        embeds = own.embeds
    if embeds.shape != clean.embeds.shape:
        raise PatchError(f"negative_embeds has shape {list(embeds.shape)}: expected {list(clean.embeds.shape)}")
    if added is None and own is not None and own.pooled is not None:
        time_ids = clean.time_ids if clean.time_ids is not None else default_time_ids(pipe)
        added = (own.pooled, time_ids)
    return _condition(pipe, "negative_embeds", embeds, added)
