"""Metrics: one number a run, higher for a run that is closer to the clean one or fits its prompt better.

===================  ========================================================  ============  =======================
name                 score                                                     range         protocols
===================  ========================================================  ============  =======================
``clip_score``       100 x cosine of picture and prompt, in a CLIP space       -100 to 100   free
``latent_cosine``    cosine of the final latents with the clean run's          -1 to 1       free
``latent_l2``        minus their distance, relative to the clean run's norm    up to 0       free
``text_cosine``      cosine of text states with the clean ones, mean of tokens -1 to 1       any, text sites only
``text_l2``          minus their distance, relative to the clean norm          up to 0       any, text sites only
``noise_cosine``     cosine of the conditional output with the clean run's     -1 to 1       teacher_forced
``noise_l2``         minus their distance, relative to the clean norm          up to 0       teacher_forced
``x0_l2``            minus the distance of the predicted pictures' latents     up to 0       teacher_forced
``x0_clip_score``    ``clip_score`` of the predicted picture, decoded          -100 to 100   teacher_forced
===================  ========================================================  ============  =======================

Distances carry a minus sign so that everywhere a restored run above its corrupted run means an effect towards clean.
The last four are means over the denoising steps. ``clip_score`` alone means the packaged model's own scorer;
``clip_score:<folder or hub id>`` any CLIP of transformers (and so ``x0_clip_score:...``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MetricError
from ..pipeline import decode_latents
from .scorers import clip_scores, find_scorer

Needs: TypeAlias = Literal["images", "latents", "text", "outputs"]
PictureMetric: TypeAlias = Callable[[Tensor, list[str]], Any]
"""``(images [N, 3, H, W] in [0, 1], prompts) -> N scores``."""


@dataclass(frozen=True)
class RunBatch:
    """Runs to score. Rows are runs of one (prompt, seed, noise sample); clean and corrupted are rows like any other.

    Attributes:
        prompts: what each run's picture should show, ``N`` of them.
        images: ``[N, 3, H, W]`` in [0, 1].
        latents: final latents ``[N, C, h, w]``.
        clean_latents: the clean run's, ``[C, h, w]``.
        text: states of the text encoder as the UNet reads them, ``[N, T, D]``.
        clean_text: the clean run's, ``[T, D]``.
        outputs: conditional model output at each of ``S`` steps, before guidance, ``[N, S, C, h, w]``.
        clean_outputs: the clean run's, ``[S, C, h, w]``.
        timesteps: of the steps, ``[S]``.
        inputs: the latents that every teacher-forced run sees, as the UNet reads them, ``[S, C, h, w]``; only the
            decoding of predicted pictures needs them.
    """

    prompts: list[str]
    images: Tensor | None = None
    latents: Tensor | None = None
    clean_latents: Tensor | None = None
    text: Tensor | None = None
    clean_text: Tensor | None = None
    outputs: Tensor | None = None
    clean_outputs: Tensor | None = None
    timesteps: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A named score.

    Attributes:
        name: as in tables.
        needs: the field of `RunBatch` that it reads (with its clean counterpart).
        function: the score of each run.
    """

    name: str
    needs: Needs
    function: Callable[[RunBatch], Tensor]

    def score(self, run: RunBatch) -> Tensor:
        """Scores ``[N]``, float32 on the CPU.

        Raises:
            MetricError: what it reads is not there, or the scores are not ``N`` finite numbers.
        """
        if getattr(run, self.needs) is None:
            raise MetricError(f"metric {self.name!r} needs {self.needs}, which these runs do not have")
        scores = torch.as_tensor(self.function(run)).detach().float().cpu()
        if scores.shape != (len(run.prompts),):
            raise MetricError(
                f"metric {self.name!r} returned shape {list(scores.shape)}: expected [{len(run.prompts)}], one number "
                "a run"
            )
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).nonzero()[0, 0])
            raise MetricError(f"metric {self.name!r} gave {float(scores[bad])} for run {bad}: expected a finite number")
        return scores


Builder: TypeAlias = Callable[[Any, str], Callable[[RunBatch], Tensor]]

# What each protocol's runs have to score. A text metric is served wherever text sites are patched.
_SERVED: dict[str, tuple[Needs, ...]] = {"free": ("images", "latents", "text"), "teacher_forced": ("outputs", "text")}


def resolve_metrics(
    metrics: Iterable[str | PictureMetric], pipe: Any, protocol: str, *, parts: Iterable[str] = ()
) -> list[Metric]:
    """Metrics by name, or any callables on pictures, checked against what the protocol can serve.

    Args:
        metrics: names of this module's table, or callables ``(images, prompts) -> scores``, named by ``__name__``.
        pipe: the pipeline that is traced. A scorer goes to its device; nothing of it is shared or changed.
        protocol: ``"free"`` or ``"teacher_forced"``.
        parts: parts of the pipeline whose sites are patched; text metrics are refused where the UNet is among them.

    Raises:
        MetricError: an unknown name, one given twice, one that the protocol or the sites cannot serve (with the ones
            that can), or a scorer that is missing.
    """
    parts, resolved = list(parts), list[Metric]()
    for metric in metrics:
        one = _named(metric, pipe) if isinstance(metric, str) else _from_callable(metric)
        if one.name in {other.name for other in resolved}:
            raise MetricError(f"metric {one.name!r} is given twice: name each one once")
        _check_served(one, protocol, parts)
        resolved.append(one)
    if not resolved:
        raise MetricError(f"no metrics: choose from {', '.join(served_names(protocol, parts))}, or give a callable")
    return resolved


def served_names(protocol: str, parts: Iterable[str] = ()) -> list[str]:
    """Names of the metrics that a protocol serves for sites of these parts."""
    with_unet = "unet" in parts
    served = [needs for needs in _SERVED[protocol] if needs != "text" or not with_unet]
    return [name for name, (needs, _) in _TABLE.items() if needs in served]


def _check_served(metric: Metric, protocol: str, parts: Sequence[str]) -> None:
    if protocol not in _SERVED:
        raise MetricError(f"protocol={protocol!r}: expected one of {', '.join(_SERVED)}")
    can = ", ".join(served_names(protocol, parts))
    if metric.needs not in _SERVED[protocol]:
        raise MetricError(
            f"metric {metric.name!r} needs {metric.needs}, which protocol {protocol!r} does not make; it can serve "
            f"{can}"
        )
    if metric.needs == "text" and "unet" in parts:
        raise MetricError(
            f"metric {metric.name!r} reads text states, which no UNet site can change; these sites can serve {can}"
        )


def _named(name: str, pipe: Any) -> Metric:
    head, _, judge = name.partition(":")
    if head not in _TABLE:
        nearest = difflib.get_close_matches(head, _TABLE, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise MetricError(f"unknown metric {name!r}: {hint}expected one of {', '.join(_TABLE)}, or a callable")
    needs, build = _TABLE[head]
    if judge and "clip_score" not in head:
        raise MetricError(f"metric {name!r}: only clip_score and x0_clip_score take a model after the colon")
    return Metric(name, needs, build(pipe, judge))


def _from_callable(function: PictureMetric) -> Metric:
    if not callable(function):
        raise MetricError(f"metric {function!r}: expected a name or a callable (images, prompts) -> scores")
    name = getattr(function, "__name__", type(function).__name__).strip("<>")

    def score(run: RunBatch) -> Tensor:
        assert run.images is not None
        scores = function(run.images, run.prompts)
        try:
            return torch.as_tensor(scores)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(f"metric {name!r} returned {type(scores).__name__}, not numbers: {error}") from error

    return Metric(name, "images", score)


def _cosine(values: Tensor, clean: Tensor, first: int) -> Tensor:
    """Cosine over the dimensions from ``first`` on, averaged over those between it and the runs; ``[N]``."""
    cosine = F.cosine_similarity(values.double().flatten(first), clean.double()[None].flatten(first), dim=-1)
    return cosine.reshape(values.shape[0], -1).mean(1)


def _minus_distance(values: Tensor, clean: Tensor, first: int) -> Tensor:
    """Minus the relative L2 distance over the dimensions from ``first`` on, averaged over the others; ``[N]``."""
    target = clean.double()[None].flatten(first)
    distance = (values.double().flatten(first) - target).norm(dim=-1) / target.norm(dim=-1).clamp_min(1e-30)
    return -distance.reshape(values.shape[0], -1).mean(1)


def _against_clean(field: Needs, compare: Callable[[Tensor, Tensor, int], Tensor], first: int) -> Builder:
    def score(run: RunBatch) -> Tensor:
        values, clean = getattr(run, field), getattr(run, f"clean_{field}")
        if clean is None:
            raise MetricError(f"clean_{field} is missing: {field} are compared with the clean run's")
        return compare(values, clean.to(values.device), first)

    return lambda pipe, judge: score


def _clip_score(pipe: Any, judge: str) -> Callable[[RunBatch], Tensor]:
    scorer = find_scorer(pipe, judge)

    def score(run: RunBatch) -> Tensor:
        assert run.images is not None
        return clip_scores(scorer, run.images, run.prompts)

    return score


def _x0_clip_score(pipe: Any, judge: str) -> Callable[[RunBatch], Tensor]:
    scorer = find_scorer(pipe, judge)

    def score(run: RunBatch) -> Tensor:
        x0 = _predicted(pipe.scheduler, run)
        images = decode_latents(pipe, x0.flatten(0, 1).to(pipe.unet.dtype))
        prompts = [prompt for prompt in run.prompts for _ in range(x0.shape[1])]
        return clip_scores(scorer, images, prompts).reshape(x0.shape[:2]).mean(1)

    return score


def _x0_l2(pipe: Any, judge: str) -> Callable[[RunBatch], Tensor]:
    def score(run: RunBatch) -> Tensor:
        x0 = _predicted(pipe.scheduler, run)
        assert run.clean_outputs is not None
        clean = _predicted(pipe.scheduler, replace(run, outputs=run.clean_outputs[None]))[0]
        return _minus_distance(x0, clean, 2)

    return score


def _predicted(scheduler: Any, run: RunBatch) -> Tensor:
    """The clean latents that each output predicts, ``[N, S, C, h, w]``: ``x0`` in DDIM (Song et al. 2021, eq. 12).

    With signal ``a = sqrt(alphas_cumprod)`` and noise ``s = sqrt(1 - alphas_cumprod)``, an input ``a x0 + s e`` and an
    output ``e`` give ``x0 = (input - s output) / a``; an output ``v = a e - s x0`` gives ``x0 = a input - s output``.
    Inputs are as the UNet reads them, so schedulers that count in sigmas are covered: they scale to this form.
    """
    if run.inputs is None or run.timesteps is None or run.outputs is None:
        raise MetricError("predicted pictures need outputs, inputs and timesteps of the teacher-forced steps")
    outputs = run.outputs.double()
    table = scheduler.alphas_cumprod.double().cpu()
    # Sigma-based schedulers may stop between two training timesteps; they interpolate the sigmas, and so do we.
    sigmas = ((1 - table) / table).sqrt()
    sigma = torch.as_tensor(np.interp(run.timesteps.double().cpu().numpy(), np.arange(len(sigmas)), sigmas.numpy()))
    signal = (1 / (1 + sigma**2).sqrt()).reshape(-1, 1, 1, 1).to(outputs.device)
    noise = (1 - signal**2).sqrt()
    inputs = run.inputs.double().to(outputs.device)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return (inputs - noise * outputs) / signal
    if kind == "v_prediction":
        return signal * inputs - noise * outputs
    if kind == "sample":
        return outputs
    raise MetricError(f"prediction_type={kind!r}: expected epsilon, v_prediction or sample")


_TABLE: dict[str, tuple[Needs, Builder]] = {
    "clip_score": ("images", _clip_score),
    "latent_cosine": ("latents", _against_clean("latents", _cosine, 1)),
    "latent_l2": ("latents", _against_clean("latents", _minus_distance, 1)),
    "text_cosine": ("text", _against_clean("text", _cosine, 2)),
    "text_l2": ("text", _against_clean("text", _minus_distance, 1)),
    "noise_cosine": ("outputs", _against_clean("outputs", _cosine, 2)),
    "noise_l2": ("outputs", _against_clean("outputs", _minus_distance, 2)),
    "x0_l2": ("outputs", _x0_l2),
    "x0_clip_score": ("outputs", _x0_clip_score),
}
