"""What a study is asked for: its arguments, checked when they are given, and what they come to; nothing is run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..corruption import GaussianNoise
from ..errors import StudyError
from ..metrics.metrics import Metric, resolve_metrics
from ..patch import BRANCHES, Branch
from ..pipeline import needs_added
from ..prompts import Prompt, TokenizedPrompt
from ..sites import TEXT_PARTS
from .axes import Positions, SiteSet, Steps, parse_positions, parse_steps, site_sets
from .checks import MOST_STEPS, checked_prompts, checked_seeds, listed, number, one_of, text, whole_number
from .schedulers import with_scheduler

PROTOCOLS = ("free", "teacher_forced")
BASES = ("corrupted", "clean")
VALUE_SOURCES = ("zero", "mean")
INJECT = "inject:"


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of a `fasttrace.study.study.Study`, which says what each may be and what is raised."""

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
        whole_number("num_inference_steps", self.num_inference_steps, most=MOST_STEPS)
        whole_number("windows", self.windows)
        number("guidance_scale", self.guidance_scale)
        number("eta", self.eta, least=0)
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
