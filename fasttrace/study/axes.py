"""What a study's `sites`, `positions` and `steps` come to: sets of sites, tokens and denoising steps, one a run."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from ..errors import StudyError
from ..patch import ROLES
from ..sites import Site, discover_sites, find_site, select_sites
from .checks import listed

_LABEL = 60

Steps: TypeAlias = tuple[int, ...] | None
"""Denoising steps that one run patches; ``None`` for all."""


@dataclass(frozen=True)
class SiteSet:
    """The sites that one run patches, and how a table names them.

    A single site has its own name. A window of adjacent layers is ``first..last``; a set is what was asked for, joined
    by `` + ``. Its part and kind are those of its members, joined by ``+`` if they differ; its layer is the first's.
    """

    label: str
    sites: tuple[Site, ...]

    @cached_property
    def part(self) -> str:
        return "+".join(dict.fromkeys(site.part for site in self.sites))

    @cached_property
    def kind(self) -> str:
        return "+".join(dict.fromkeys(site.kind for site in self.sites))

    @property
    def layer(self) -> int:
        return self.sites[0].layer

    @cached_property
    def has_text(self) -> bool:
        return any(site.part != "unet" for site in self.sites)

    @cached_property
    def has_unet(self) -> bool:
        return any(site.part == "unet" for site in self.sites)


def site_sets(pipe: Any, given: Any, window: int) -> tuple[SiteSet, ...]:
    """The site sets of a study.

    Args:
        pipe: the pipeline.
        given: a pattern, a `Site`, or a sequence of those and of tuples of those (a tuple is patched together). What is
            given twice counts once.
        window: adjacent layers of one part and kind patched together; 1 for none.

    Raises:
        SiteError: a pattern that matches nothing.
        StudyError: something of another type, windows of sets, or a window that is wider than the layers chosen.
    """
    everything = discover_sites(pipe)
    elements = [given] if isinstance(given, str | Site | tuple) else listed("sites", given)
    if not elements or any(isinstance(element, tuple) and not element for element in elements):
        raise StudyError('sites is empty: expected "unet", "text", names or globs')
    singles: dict[str, Site] = {}
    sets: dict[str, SiteSet] = {}
    for element in elements:
        if isinstance(element, tuple):
            members = {site.name: site for pattern in element for site in _sites(pipe, everything, pattern)}
            label = " + ".join(pattern.name if isinstance(pattern, Site) else str(pattern) for pattern in element)
            sets[label] = SiteSet(label, _in_order(everything, members))
        else:
            singles |= {site.name: site for site in _sites(pipe, everything, element)}
    if window > 1 and sets:
        raise StudyError(
            f"windows={window} with a set of sites: a window is made of single layers; drop one of the two"
        )
    ordered = _in_order(everything, singles)
    if window > 1:
        return _windows(ordered, window)
    return tuple(({site.name: SiteSet(site.name, (site,)) for site in ordered} | sets).values())


def _sites(pipe: Any, everything: list[Site], pattern: Any) -> list[Site]:
    if isinstance(pattern, Site):
        return [find_site(pipe, pattern.name)]
    if not isinstance(pattern, str):
        raise StudyError(f"sites has {pattern!r}: expected a name, a glob, a Site, or a tuple of those")
    if any(mark in pattern for mark in "*?[") or pattern in ("unet", "text", "all"):
        return select_sites(everything, pattern)
    return [find_site(pipe, pattern)]


def _in_order(everything: list[Site], chosen: dict[str, Site]) -> tuple[Site, ...]:
    """Execution order; whole blocks, which are not among the discovered sites, last."""
    listed = [site for site in everything if site.name in chosen]
    names = {site.name for site in listed}
    return (*listed, *(site for name, site in chosen.items() if name not in names))


def _windows(sites: Sequence[Site], width: int) -> tuple[SiteSet, ...]:
    rows: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        rows.setdefault((site.part, site.kind), []).append(site)
    windows = []
    for row in rows.values():
        for start in range(len(row) - width + 1):
            members = tuple(row[start : start + width])
            if members[-1].layer - members[0].layer == width - 1:
                windows.append(SiteSet(f"{members[0].name}..{members[-1].name}", members))
    if not windows:
        raise StudyError(f"windows={width}: no {width} adjacent layers of one kind among the {len(sites)} sites chosen")
    return tuple(windows)


@dataclass(frozen=True)
class Positions:
    """Positions that are patched.

    Attributes:
        given: as the study has them.
        sets: one element for each run: a role or indices; ``None`` for the default of each kind of site.
        each: ``"each"`` for every token in turn, ``"tokens"`` for those up to the end of text; else empty.
    """

    given: Any
    sets: tuple[str | tuple[int, ...], ...] | None
    each: str = ""

    def check(self, has_text: bool, has_unet: bool) -> None:
        """Refuse positions that the chosen sites cannot take."""
        if self.sets is None and not self.each:
            return
        if not has_text:
            if self.each or len(self.sets or ()) != 1 or isinstance((self.sets or ("",))[0], str):
                raise StudyError(
                    f"positions={self.given!r}: UNet sites have pixels, not tokens; leave positions out, or give "
                    "the indices of one set of pixels"
                )
        elif has_unet and any(not isinstance(one, str) for one in self.sets or ()):
            raise StudyError(
                f"positions={self.given!r}: indices would mean tokens at text sites and pixels in the UNet; use roles, "
                "or a study for each"
            )


def parse_positions(given: Any) -> Positions:
    """A study's ``positions`` in one form.

    Raises:
        StudyError: an unknown role, or something that is neither a role nor indices.
    """
    if given is None:
        return Positions(given, None)
    if isinstance(given, str) and given in ("each", "tokens"):
        return Positions(given, None, each=given)
    elements = [given] if isinstance(given, str) else listed("positions", given)
    if all(_is_index(element) for element in elements):
        return Positions(given, (_set(elements),))
    sets: list[str | tuple[int, ...]] = []
    for element in elements:
        if isinstance(element, str):
            if element not in (*ROLES, "all"):
                raise StudyError(
                    f"positions has {element!r}: expected each, tokens, all, {', '.join(ROLES)}, or indices"
                )
            sets.append(element)
        elif _is_index(element):
            sets.append((int(element),))
        elif isinstance(element, Sequence) and all(_is_index(index) for index in element):
            sets.append(_set(element))
        else:
            raise StudyError(f"positions has {element!r}: expected a role or indices")
    return Positions(given, tuple(dict.fromkeys(sets)))


def _set(indices: Iterable[Any]) -> tuple[int, ...]:
    """Ascending, each once: sets that patch the same positions are one."""
    return tuple(sorted({int(index) for index in indices}))


def index_label(indices: Sequence[int]) -> str:
    """Ascending indices in few characters, different for every set: ``1,3-76``, ``none``, or a digest of many."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
    if len(text) <= _LABEL:
        return text
    return f"{indices[0]}-{indices[-1]}, {len(indices)} of them, {zlib.crc32(text.encode()):08x}"


def parse_steps(given: Any, count: int) -> tuple[Steps, ...]:
    """A study's ``steps`` as sets of step indices.

    Args:
        given: ``None``, indices, a list of sets, ``"each"``, or ``{"width": w, "stride": s}``.
        count: denoising steps.

    Raises:
        StudyError: another form, a step out of range, or two sets that share their first and last step.
    """
    if given is None:
        return (None,)
    if isinstance(given, str) and given == "each":
        return tuple((step,) for step in range(count))
    if isinstance(given, dict):
        return _step_windows(given, count)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise StudyError(
            f'steps={given!r}: expected None, indices, a list of sets, "each" or {{"width": 5, "stride": 5}}'
        )
    elements = list(given)
    sets = [elements] if all(_is_index(step) for step in elements) else elements
    parsed: list[Steps] = []
    for one in sets:
        if one is None:
            parsed.append(None)
            continue
        if _is_index(one) or not isinstance(one, Iterable) or not all(_is_index(step) for step in one):
            raise StudyError(f"steps has {one!r}: expected a set of indices, as every other element")
        outside = [step for step in one if not 0 <= step < count]
        if outside:
            raise StudyError(f"steps has {outside[0]}: expected 0 to {count - 1}")
        parsed.append(tuple(sorted({int(step) for step in one})))
    spans = [step_span(one, count) for one in parsed]
    twice = next((span for span in spans if spans.count(span) > 1), None)
    if twice is not None:
        raise StudyError(f"steps has two sets from {twice[0]} to {twice[1]}: a table could not tell them apart")
    return tuple(parsed)


def step_span(steps: Steps, count: int) -> tuple[int, int]:
    """First step, and one past the last, as tables give them."""
    if steps is None:
        return 0, count
    return (steps[0], steps[-1] + 1) if steps else (0, 0)


def _step_windows(given: dict[str, Any], count: int) -> tuple[Steps, ...]:
    unknown = sorted(set(given) - {"width", "stride"})
    width, stride = given.get("width", 0), given.get("stride", 1)
    if unknown or not _is_index(width) or not _is_index(stride):
        raise StudyError(f'steps={given!r}: expected {{"width": 5, "stride": 5}} with whole numbers')
    if not 1 <= width <= count or stride < 1:
        raise StudyError(f"steps={given!r}: expected a width from 1 to {count} and a stride of at least 1")
    starts = range(0, count - width + 1, stride)
    windows = [tuple(range(start, start + width)) for start in starts]
    if max(windows[-1][-1] + 1, starts[-1] + stride) < count:  # no step is left out: the last window is shorter
        windows.append(tuple(range(starts[-1] + stride, count)))
    return tuple(windows)


def _is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
