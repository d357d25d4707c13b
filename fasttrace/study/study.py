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

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..corruption import GaussianNoise
from ..errors import StudyError
from ..patch import BRANCHES, Branch
from ..pipeline import needs_added
from ..prompts import Prompt, TokenizedPrompt
from ..sites import TEXT_PARTS
from .axes import Positions, SiteSet, Steps, parse_positions, parse_steps, site_sets
from .checks import checked_prompts, checked_seeds, listed, number, one_of, text, whole_number

if TYPE_CHECKING:
    from ..metrics.metrics import Metric
    from .plan import Plan

PROTOCOLS = ("free", "teacher_forced")
BASES = ("corrupted", "clean")
VALUE_SOURCES = ("zero", "mean")
INJECT = "inject:"


@dataclass(frozen=True, eq=False)
class Study:
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
        screening: what `fasttrace.study.screen.screen` dropped; a record, without effect.

    Raises:
        StudyError: an argument that is missing, contradictory or of the wrong form, by name.
        PromptError: a subject that is not among a prompt's tokens.
        SiteError: a site that the pipeline does not have.
        MetricError: a metric that is unknown, or that the protocol or the sites cannot serve.
    """

    pipe: Any
    prompts: Any
    sites: Any = "unet"
    positions: Any = None
    steps: Any = None
    protocol: str = "free"
    base: str = "corrupted"
    source: str = ""
    corruption: GaussianNoise = field(default_factory=GaussianNoise)
    seeds: Sequence[int] = (0,)
    metrics: Sequence[str | Callable[..., Any]] = ("clip_score",)
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    eta: float = 0.0
    branch: Branch = "cond"
    windows: int = 1
    sources: Mapping[str, str] = field(default_factory=dict)
    scheduler: Any = None
    scored_text: str = "prompt"
    sigma: Mapping[str, float] | None = None
    preset: str | None = None
    screening: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._set("prompts", checked_prompts(self.prompts))
        self._set("seeds", checked_seeds(self.seeds))
        self._set("metrics", [self.metrics] if isinstance(self.metrics, str) else list(listed("metrics", self.metrics)))
        if not isinstance(self.corruption, GaussianNoise):
            raise StudyError(f"corruption={self.corruption!r}: expected ft.GaussianNoise(scale, samples=, seed=)")
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("base", self.base, BASES)
        one_of("branch", self.branch, BRANCHES)
        one_of("scored_text", self.scored_text, ("prompt", "target"))
        whole_number("num_inference_steps", self.num_inference_steps)
        whole_number("windows", self.windows)
        for name in ("guidance_scale", "eta"):
            number(name, getattr(self, name))
        text("negative_prompt", self.negative_prompt)
        if not isinstance(self.sources, Mapping):
            raise StudyError(f"sources={self.sources!r}: expected a mapping of names to texts")
        for name, value in self.sources.items():
            text(f"sources[{name!r}]", value)
        self._set("source", self._checked_source())
        self._check_sites()
        self._set("sigma", self._resolved_sigma())
        _ = self.resolved_metrics

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    # What the arguments come to.

    @cached_property
    def site_sets(self) -> tuple[SiteSet, ...]:
        """What each run patches, in execution order."""
        return site_sets(self.pipe, self.sites, self.windows)

    @cached_property
    def position_sets(self) -> Positions:
        return parse_positions(self.positions)

    @cached_property
    def step_sets(self) -> tuple[Steps, ...]:
        """The sets of denoising steps that are patched; ``(None,)`` for all steps."""
        return parse_steps(self.steps, self.step_count)

    @cached_property
    def step_count(self) -> int:
        """Denoising steps, ``len(scheduler.timesteps)``; PNDM takes one more than it is asked for."""
        if getattr(self.pipe, "unet", None) is None:
            return self.num_inference_steps
        scheduler = copy.deepcopy(self.traced_pipe.scheduler)
        scheduler.set_timesteps(self.num_inference_steps)
        return len(scheduler.timesteps)

    @cached_property
    def traced_pipe(self) -> Any:
        """The pipeline with the study's scheduler: a view on the user's own, which keeps its scheduler."""
        from .schedulers import with_scheduler

        return with_scheduler(self.pipe, self.scheduler)

    @cached_property
    def text_parts(self) -> tuple[str, ...]:
        """The pipeline's text encoders."""
        return tuple(part for part in TEXT_PARTS if getattr(self.pipe, part, None) is not None)

    @cached_property
    def tokens(self) -> dict[str, dict[str, TokenizedPrompt]]:
        """Every prompt as every encoder reads it: by part, then by prompt id."""
        return {
            part: {prompt.id: prompt.tokenize(self.tokenizer(part)) for prompt in self.prompts}
            for part in self.text_parts
        }

    def tokenizer(self, part: str) -> Any:
        return getattr(self.pipe, part.replace("text_encoder", "tokenizer"))

    @cached_property
    def resolved_metrics(self) -> list[Metric]:
        from ..metrics.metrics import resolve_metrics

        parts = {site.part for one in self.site_sets for site in one.sites}
        return resolve_metrics(self.metrics, self.traced_pipe, self.protocol, parts=sorted(parts))

    @property
    def needs_unet(self) -> bool:
        """Whether any metric needs denoising; text metrics do not."""
        return any(metric.needs != "text" for metric in self.resolved_metrics)

    def reads(self, part: str) -> tuple[str, ...]:
        """What the UNet reads of a text encoder: outputs of `fasttrace.trace_text`."""
        if not needs_added(self.pipe):
            return ("last",)
        return ("penultimate", "pooled") if part == self.text_parts[-1] else ("penultimate",)

    def seeds_of(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.seeds) if prompt.seeds is None else prompt.seeds

    def text_of(self, source: str, prompt: Prompt) -> str:
        """The text behind a source that names one, with or without ``inject:``."""
        name = source.removeprefix(INJECT)
        if name == "clean":
            return prompt.text
        if name == "empty":
            return ""
        return str(prompt.target) if name == "target" else self.sources[name]

    # What can be done with a study.

    def plan(self) -> Plan:
        """The runs as plain data, without any forward pass."""
        from .plan import make_plan

        return make_plan(self)

    def subset(self, prompts: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Study:
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
        from .record import study_record
        from .store import write_json

        write_json(Path(path), study_record(self))

    @classmethod
    def from_json(cls, path: str | Path, pipe: Any, **overrides: Any) -> Study:
        """The study that a ``study.json`` describes, on a pipeline that is the same model.

        Args:
            path: a ``study.json``, or the folder of a run.
            pipe: the pipeline.
            overrides: arguments of `Study` to replace; needed for metrics that were callables.

        Raises:
            StudyError: a field that is missing or unknown, or another model than was recorded.
        """
        from .reading import read_study

        return read_study(Path(path), pipe, overrides)

    # Checks.

    def _checked_source(self) -> str:
        source = self.source or ("clean" if self.base == "corrupted" else "corrupted")
        if not isinstance(source, str):
            raise StudyError(f"source={source!r}: expected the name of a run, a text, zero or mean")
        texts = ("target", "empty", *self.sources)
        reserved = {"clean", "corrupted", "target", "empty", *VALUE_SOURCES} & set(self.sources)
        if reserved:
            raise StudyError(f"sources has the name {min(reserved)!r}, which has a meaning of its own: choose another")
        known = ("clean", "corrupted", *texts, *VALUE_SOURCES, *(INJECT + text for text in ("clean", *texts)))
        if source not in known:
            raise StudyError(f"source={source!r}: expected one of {', '.join(known)}")
        if source == self.base:
            raise StudyError(
                f"source={source!r} is the base itself, so that no patch would change anything: choose another source"
            )
        wanting = [prompt for prompt in self.prompts if prompt.target is None]
        wants_target = source.removeprefix(INJECT) == "target" or self.scored_text == "target"
        if wants_target and wanting:
            raise StudyError(f"prompt {wanting[0].id!r} has no target, which the study needs: give target=...")
        return source

    def _check_sites(self) -> None:
        sites = [site for one in self.site_sets for site in one.sites]
        text_sites = [site for site in sites if site.part != "unet"]
        self.position_sets.check(has_text=bool(text_sites), has_unet=len(text_sites) < len(sites))
        if self.steps is not None and not any(site.part == "unet" for site in sites):
            raise StudyError(f"steps={self.steps!r}: a text encoder runs once, before denoising; use steps=None")
        _ = self.step_sets
        if self.source.startswith(INJECT):
            other = next((site for site in sites if site.part != "unet" or site.kind != "cross_attn"), None)
            if other is not None:
                raise StudyError(f"source={self.source!r} feeds cross-attention, but {other.name} is a {other.kind}")
            if self.protocol != "free" or self.positions is not None or self.branch != "cond":
                raise StudyError(
                    f'source={self.source!r} takes whole maps of the conditional branch in the protocol "free": '
                    "leave out protocol, positions and branch"
                )
        if self.source == "mean" and self.protocol != "free" and len(text_sites) < len(sites):
            raise StudyError('source="mean" is of free runs at UNet sites: use protocol="free"')

    def _resolved_sigma(self) -> dict[str, float]:
        if self.sigma is not None:
            if not isinstance(self.sigma, Mapping) or set(self.sigma) != set(self.text_parts):
                raise StudyError(
                    f"sigma={self.sigma!r}: expected a mapping with one number for each of {', '.join(self.text_parts)}"
                )
            for part, value in self.sigma.items():
                number(f"sigma[{part!r}]", value, least=0)
            return {part: float(self.sigma[part]) for part in self.text_parts}
        resolved = {}
        for part in self.text_parts:
            table = getattr(self.pipe, part).get_input_embeddings().weight
            ids = [tokens.ids[position] for tokens in self.tokens[part].values() for position in tokens.subject]
            resolved[part] = self.corruption.resolve(table, ids)
        return resolved
