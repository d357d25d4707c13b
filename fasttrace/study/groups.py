"""The runs of a prompt as plain data, with roles resolved and runs that need no forward pass known.

The unit is the group, one (prompt, seed, noise sample): runs of one group share their clean run, their corrupted run
and their latents. Groups of one prompt have the same runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import StudyError
from ..patch import Patch
from ..prompts import Prompt, TokenizedPrompt
from ..sites import is_causal
from .axes import SiteSet, Steps, index_label
from .settings import INJECT, Settings

# A run that patches more tokens than this is labelled by the first and the last.
_TOKENS_SHOWN = 6

TextPatches = tuple[tuple[str, tuple[int, ...] | None], ...]
"""What is overwritten in the text encoders: (site, positions), ascending; ``()`` leaves the base text."""


@dataclass(frozen=True)
class Run:
    """One restored run of a prompt.

    Attributes:
        site_set: what is patched.
        position: the one position that is patched, or ``None`` for several or all.
        token: its token, or tokens, as text; empty for UNet sites.
        token_role: the role asked for, or the role of the position; ``"tokens 1,3-5"`` for several indices,
            ``"pixels 1,3-5"`` for those of a feature map, ``"all"`` without positions.
        steps: denoising steps, for UNet sites.
        text: text patches that change anything; equal ones give equal text states.
        unet: positions of the UNet patches: ``None`` for the whole map.
    """

    site_set: SiteSet
    position: int | None
    token: str
    token_role: str
    steps: Steps
    text: TextPatches
    unet: tuple[int, ...] | None

    @property
    def patches_unet(self) -> bool:
        return self.site_set.has_unet and self.steps != () and self.unet != ()


@dataclass(frozen=True)
class PromptPlan:
    """The runs of one prompt, and which of them have to be denoised.

    Attributes:
        prompt: the prompt.
        runs: in the order of the table.
        texts: distinct text patches, without the base's ``()``.
        text_of: for each run the index of its text patches in ``texts``; -1 for the base text.
        distinct: indices of the runs that have to be denoised: the first of each that would come out equal.
        same_as: for each run the index in ``distinct`` of the one that it equals; -1 for the base run itself.
    """

    prompt: Prompt
    runs: tuple[Run, ...]
    texts: tuple[TextPatches, ...]
    text_of: tuple[int, ...]
    distinct: tuple[int, ...]
    same_as: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """One (prompt, seed, noise sample)."""

    plan: PromptPlan
    seed: int
    noise_sample: int


def unet_patches(study: Settings, run: Run) -> tuple[Patch, ...]:
    """A run's patches in the UNet; sources that are texts are called ``"other"``."""
    if not run.patches_unet or study.source.startswith(INJECT):
        return ()
    source = patch_source(study.source)
    sites = [site for site in run.site_set.sites if site.part == "unet"]
    return tuple(Patch(site, run.unet, run.steps, study.branch, source) for site in sites)


def patch_source(source: str) -> str:
    """A study's source as a trace names it."""
    return source if source in ("clean", "corrupted", "zero", "mean") else "other"


def prompt_plan(study: Settings, prompt: Prompt) -> PromptPlan:
    """Enumerate the runs of one prompt.

    Raises:
        StudyError: a role that the prompt does not have, or positions beyond its tokens.
    """
    tokens = {part: study.tokens[part][prompt.id] for part in study.text_parts}
    runs = tuple(_runs(study, prompt, tokens))
    texts: dict[TextPatches, int] = {}
    distinct: list[int] = []
    seen: dict[TextPatches, int] = {}
    text_of, same_as = [], []
    for index, run in enumerate(runs):
        text = texts.setdefault(run.text, len(texts)) if run.text else -1
        text_of.append(text)
        if not run.patches_unet and not run.text:
            same_as.append(-1)
        elif not run.patches_unet and run.text in seen:
            same_as.append(seen[run.text])
        else:
            if not run.patches_unet:
                seen[run.text] = len(distinct)
            same_as.append(len(distinct))
            distinct.append(index)
    return PromptPlan(prompt, runs, tuple(texts), tuple(text_of), tuple(distinct), tuple(same_as))


@dataclass(frozen=True)
class _Place:
    """Where one run of some site sets patches a prompt: all that does not depend on the sites themselves.

    Attributes:
        text: by text encoder, the positions where a patch changes anything; ``None`` for all.
        unet: pixels, or ``None`` for whole maps.
        label: position, token and token role.
    """

    text: dict[str, tuple[int, ...] | None]
    unet: tuple[int, ...] | None
    label: tuple[int | None, str, str]


def _runs(study: Settings, prompt: Prompt, tokens: dict[str, TokenizedPrompt]) -> Iterator[Run]:
    places: dict[str, list[_Place]] = {}  # by the parts that a site set patches
    for site_set in study.site_sets:
        if site_set.part not in places:
            places[site_set.part] = list(_places(study, prompt, tokens, site_set))
        text_sites = [site for site in site_set.sites if site.part != "unet"]
        for place in places[site_set.part]:
            text = tuple((site.name, place.text[site.part]) for site in text_sites if place.text[site.part] != ())
            for steps in study.step_sets if site_set.has_unet else (None,):
                yield Run(site_set, *place.label, steps, text, place.unet)


def _places(study: Settings, prompt: Prompt, tokens: dict[str, TokenizedPrompt], site_set: SiteSet) -> Iterator[_Place]:
    patched = {part: tokens[part] for part in site_set.part.split("+") if part != "unet"}
    for where in _position_sets(study, patched):
        at = {part: _resolve(where, prompt, one) for part, one in patched.items()}
        effective = {part: _effective(study, part, patched[part], positions) for part, positions in at.items()}
        unet = where if isinstance(where, tuple) and not patched else None
        yield _Place(effective, unet, _label(where, patched, at))


def _position_sets(study: Settings, patched: dict[str, TokenizedPrompt]) -> list[str | tuple[int, ...] | None]:
    """The positions of each run of a site set: a role, indices, or ``None`` for whole maps of the UNet.

    Args:
        study: the study.
        patched: the prompt in each text encoder that the site set patches.
    """
    asked = study.position_sets
    if not patched:
        return list(asked.sets) if asked.sets is not None and not isinstance(asked.sets[0], str) else [None]
    if asked.sets is not None:
        return list(asked.sets)
    stop = min(one.eos + 1 if asked.each == "tokens" else len(one.ids) for one in patched.values())
    return [(position,) for position in range(stop)]


def _resolve(where: str | tuple[int, ...] | None, prompt: Prompt, tokens: TokenizedPrompt) -> tuple[int, ...] | None:
    """Positions in one encoder; ``None`` for all."""
    if where is None or where == "all":
        return None
    if isinstance(where, str):
        positions = tokens.role(where)
        if not positions:
            raise StudyError(
                f"prompt {prompt.id!r} has no {where!r} token among its {len(tokens.ids)}: leave that role out, or "
                "shorten the prompt"
            )
        return positions
    return where


def _effective(
    study: Settings, part: str, tokens: TokenizedPrompt, positions: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Positions where a patch changes anything; ``None`` for all.

    In a causal encoder the clean and the corrupted run are the same before the first corrupted token.
    """
    length, first = len(tokens.ids), tokens.subject[0]
    outside = [position for position in positions or () if not 0 <= position < length]
    if outside:
        raise StudyError(f"position {outside[0]} is out of range: the prompts have {length} tokens in {part}")
    if study.source not in ("clean", "corrupted") or not is_causal(getattr(study.pipe, part)):
        return positions
    everything = range(length) if positions is None else positions
    return tuple(sorted(position for position in everything if position >= first))


def _label(
    where: str | tuple[int, ...] | None,
    patched: dict[str, TokenizedPrompt],
    at: dict[str, tuple[int, ...] | None],
) -> tuple[int | None, str, str]:
    """Position, token and token role as a table shows them; read in the first encoder that is patched."""
    if not patched:
        if not isinstance(where, tuple):
            return None, "", "all"
        return (where[0], "", "pixel") if len(where) == 1 else (None, "", f"pixels {index_label(where)}")
    part, tokens = next(iter(patched.items()))
    positions = at[part]
    if positions is None:
        return None, "", "all"
    words = [tokens.tokens[position] for position in positions]
    text = " ".join(words) if len(words) <= _TOKENS_SHOWN else f"{words[0]} .. {words[-1]}"
    if len(positions) == 1:
        role = where if isinstance(where, str) else tokens.role_of(positions[0])
        return positions[0], text, role
    return None, text, where if isinstance(where, str) else f"tokens {index_label(positions)}"
