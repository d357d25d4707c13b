"""A study: what to patch, in which prompts, and how to score it; checked when it is made, before anything runs.

=============  ======================================================================================================
argument       what it may be
=============  ======================================================================================================
``sites``      ``"unet"``, ``"text"``, ``"all"``, names or globs: one run each. A tuple of those: one run for all of it
``windows``    how many adjacent layers of one kind a run patches together
``positions``  text sites: ``"each"`` token in turn (the default), ``"tokens"`` (each up to the end of text), ``"all"``,
               a token role, indices (one set), or a list of roles and sets (one run each).
               UNet sites: the whole map, or one set of pixels
``steps``      ``None`` for all, indices (one set), a list of sets (a grid), ``"each"``, ``{"width": 5, "stride": 5}``;
               UNet sites only
``base``       ``"corrupted"`` (restoring) or ``"clean"`` (noising)
``source``     ``"clean"``, ``"corrupted"``, ``"target"`` (the run of the prompt's target), ``"empty"`` (of the empty
               prompt), a key of ``sources``, ``"zero"``, ``"mean"``, or ``"inject:"`` and one of the texts above:
               then cross-attention reads that text's keys and values with the run's own queries (LocoGen, Basu et al.
               2024), where a plain source overwrites its output
=============  ======================================================================================================

``"mean"`` is the mean of the clean runs of the study's prompts: for a text site at each position; for a UNet site at
each step and channel, over prompts, seeds and pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from ..errors import StudyError
from ..findings.folder import write_json
from .plan import Plan, make_plan
from .record import read_study, study_record
from .settings import Settings


class Study(Settings):
    """What to patch, in which prompts, and how to score it. The module's docstring lists what each argument may be.

    Args:
        pipe: a diffusers pipeline; unchanged by anything done with the study.
        prompts: `Prompt` objects, a JSONL file, or a packaged prompt set (see `fasttrace.study.promptsets`).
        sites: what is patched.
        positions: tokens or pixels that are patched.
        steps: denoising steps that are patched, as indices into ``scheduler.timesteps``; UNet sites only.
        protocol: ``"free"`` or ``"teacher_forced"``.
        base: the run that is patched.
        source: what a patch writes; left out, ``"clean"``, or ``"corrupted"`` where the base is clean.
        corruption: noise on the subject's word embeddings.
        seeds: of the latents and the scheduler's noise; a prompt's own ``seeds`` come first.
        metrics: names of `fasttrace.metrics.metrics`, or callables ``(images, prompts) -> scores``.
        num_inference_steps: as given to the scheduler.
        guidance_scale: of classifier-free guidance; 1 or less runs without.
        negative_prompt: text of the unconditional branch.
        eta: of DDIM.
        branch: branch of classifier-free guidance that UNet patches apply to.
        windows: adjacent layers patched together.
        sources: further texts by name, for ``source``.
        scheduler: ``None`` for the pipeline's own, a name of `fasttrace.study.schedulers`, or a scheduler object.
        scored_text: ``"prompt"`` or ``"target"``: the text that pictures are scored against.
        sigma: the corruption's standard deviation for each text encoder, if it is known already; else it is resolved
            from ``corruption`` for all of the study's subjects.
        preset: name of the preset that the settings come from; a record, without effect.
        screening: what `fasttrace.study.screening.screen` dropped; a record, without effect.

    Raises:
        StudyError: an argument that is missing, contradictory or of the wrong form, by name.
        PromptError: a subject that is not among a prompt's tokens.
        SiteError: a site that the pipeline does not have.
        MetricError: a metric that is unknown, or that the protocol or the sites cannot serve.
    """

    def plan(self) -> Plan:
        """The runs as plain data, without any forward pass."""
        return make_plan(self)

    def subset(self, prompts: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Self:
        """The same study for some prompts, by id, and some seeds. The noise stays that of the whole study.

        Raises:
            StudyError: an id or a seed that the study does not have, or nothing left.
        """
        chosen = list(self.prompts)
        if prompts is not None:
            wanted = list(prompts)
            unknown = sorted(set(wanted) - {prompt.id for prompt in self.prompts})
            if unknown:
                raise StudyError(f"subset: the study has no prompt {unknown[0]!r}")
            chosen = [prompt for prompt in self.prompts if prompt.id in wanted]
        if seeds is not None:
            keep = set(seeds)
            unknown_seeds = sorted(keep - {seed for prompt in self.prompts for seed in self.seeds_of(prompt)})
            if unknown_seeds:
                raise StudyError(f"subset: the study has no seed {unknown_seeds[0]}")
            left = [(prompt, tuple(s for s in self.seeds_of(prompt) if s in keep)) for prompt in chosen]
            chosen = [dataclasses.replace(prompt, seeds=own) for prompt, own in left if own]
        return dataclasses.replace(self, prompts=chosen)

    def to_json(self, path: str | Path) -> None:
        """Write everything that is needed to repeat the study."""

        write_json(Path(path), study_record(self))

    @classmethod
    def from_json(cls, path: str | Path, pipe: Any, **overrides: Any) -> Self:
        """The study that a ``study.json`` describes, on a pipeline that is the same model.

        Args:
            path: a ``study.json``, or the folder of a run.
            pipe: the pipeline.
            overrides: arguments of `Study` to replace; needed for metrics that were callables.

        Raises:
            StudyError: a field that is missing or unknown, or another model than was recorded.
        """
        return read_study(Path(path), pipe, overrides, cls)
