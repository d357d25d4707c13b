"""What the engines must know of a pipeline's denoiser to call it as the pipeline does: the interface of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..encoding import encode
from ..errors import ModelError, PatchError
from ..pipeline import Condition, Conditions

Size = tuple[int, int]
"""Height and width of the latents; of packed ones, in patches."""


@dataclass(frozen=True)
class Flow:
    """What a flow-matching schedule depends on beside the number of steps.

    Attributes:
        positions: of the image in the transformer; a dynamic shift grows with their number.
        even: whether the pipeline gives sigmas itself, evenly from 1 to 1 / steps before any shift (FLUX); else they
            are the scheduler's own (SD3).
    """

    positions: int
    even: bool

    def settings(self, scheduler: Any, num_inference_steps: int) -> dict[str, Any]:
        """Arguments of ``set_timesteps``, as the pipelines give them."""
        config, given = scheduler.config, dict[str, Any]()
        if self.even and not config.get("use_flow_sigmas", False):
            given["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if config.get("use_dynamic_shifting", False):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            slope = (high - low) / (many - few)
            given["mu"] = self.positions * slope + (low - slope * few)
        return given


@dataclass(frozen=True)
class Denoiser(ABC):
    """The denoiser of one pipeline.

    Attributes:
        pipe: the user's; of it only the model and the scheduler are needed where everything else is given.
        part: which attribute of the pipeline the model is.
        masked: whether conditions may have a mask.
    """

    pipe: Any
    part: ClassVar[str] = "transformer"
    masked: ClassVar[bool] = False

    @property
    def model(self) -> Any:
        """The user's own model."""
        return getattr(self.pipe, self.part)

    @property
    @abstractmethod
    def text_width(self) -> int:
        """``D`` of text states."""

    @property
    def pooled_width(self) -> int | None:
        """``P`` of pooled text, where the model reads it."""
        return None

    @property
    def needs_time_ids(self) -> bool:
        return False

    def check(self, what: str, condition: Condition) -> None:
        """Refuse a condition that has another form than the model reads.

        Raises:
            PatchError: a wrong shape.
            ModelError: a part that is missing, or that this model does not take.
        """
        embeds, name = condition.embeds, type(self.model).__name__
        if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != self.text_width:
            found = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise PatchError(f"{what}: embeds has shape {found}: expected [T, {self.text_width}]")
        expected = {
            "pooled": None if self.pooled_width is None else (self.pooled_width,),
            "time_ids": (6,) if self.needs_time_ids else None,
            "mask": (embeds.shape[0],) if self.masked else None,
        }
        for part, shape in expected.items():
            value = getattr(condition, part)
            if value is None and (shape is None or part == "mask"):
                continue
            if shape is None:
                raise ModelError(f"{what} has {part}, which {name} does not take: leave it out")
            if value is None:
                raise ModelError(f"{what} has no {part}: {name} needs Condition(..., {part}={list(shape)})")
            if tuple(value.shape) != shape:
                raise PatchError(f"{what}: {part} has shape {list(value.shape)}, expected {list(shape)}")

    @abstractmethod
    def drawn_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` in which the pipeline draws latents, at the model's own size."""

    def packed(self, drawn: Tensor) -> Tensor:
        """Latents ``[C, h, w]`` as the model reads them."""
        return drawn

    def size(self, latents: Tensor, given: Size | None) -> Size:
        """Height and width of latents as the model reads them, without the batch.

        Raises:
            PatchError: latents of another form.
        """
        channels = self.model.config.in_channels
        if latents.ndim != 3 or latents.shape[0] != channels:
            raise PatchError(f"latents has shape {list(latents.shape)}: expected [{channels}, h, w]")
        found = (latents.shape[1], latents.shape[2])
        if given not in (None, found):
            raise PatchError(f"size={given!r}: these latents are {found[0]} x {found[1]}, which needs no size")
        return found

    def flow(self, size: Size) -> Flow | None:
        """Of pipelines that sample by flow matching."""
        return None

    def negative(self, clean: Condition) -> Condition:
        """The pipeline's own condition of the unconditional branch, the empty prompt, beside a clean one."""
        if not hasattr(self.pipe, "encode_prompt"):
            raise ModelError("no negative condition and no text encoders to make one: give it, or guidance_scale=1")
        return encode(self.pipe, "").condition

    def cfg_scale(self, guidance_scale: float, true_cfg_scale: float, has_negative: bool) -> float:
        """By how much the conditional output is taken further from the unconditional one; 1 where there is none."""
        return max(1.0, guidance_scale)

    def guidance(self, guidance_scale: float) -> Tensor | None:
        """The scale where it is an input of the model, ``[1]`` or ``[1, E]``."""
        return None

    @abstractmethod
    def call(
        self, model: Any, sample: Tensor, timestep: Tensor, texts: Conditions, guidance: Tensor | None, size: Size
    ) -> Tensor:
        """One call of the model, as the pipeline makes it.

        Args:
            model: whose; the user's own, or one that shares its weights.
            sample: latents ``[B, ...]``, scaled for the timestep.
            timestep: ``[]`` or ``[1]``, of the scheduler.
            texts: of each row.
            guidance: from `guidance`.
            size: from `size`.

        Returns:
            What the scheduler is given before guidance, ``[B, ...]`` in the shape of ``sample``.
        """

    def prediction(self, output: Tensor) -> Tensor:
        """What the scheduler is given, of all that the model puts out ``[B, ...]``."""
        return output
