"""Which denoising runs a request needs, which rows they are at one step, and which of those need no computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...patch import Patch
from ..requests.denoise import DenoiserRequest

Key: TypeAlias = tuple[int, int, int]
"""Names a row's values within a step: group, run, branch (the last is the conditional one)."""

CORRUPTED = 1
"""Index of the corrupted run in every group; the clean one is before it."""


@dataclass(frozen=True)
class Run:
    """One distinct run of a group.

    Attributes:
        condition: name of what it is denoised with.
        base: index of the run that it equals before ``start``; its own for a plain run, which carries no patch.
        patches: those that name a position and a step.
        start: the first step at which it may differ from its base.
        stop: one past the last step at which anything reads it.
    """

    condition: str
    base: int
    patches: tuple[Patch, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """The distinct runs of one request.

    Attributes:
        index: of the group among those that are traced together.
        request: what was asked.
        runs: clean is run 0 and corrupted run 1; other plain runs follow, then the patched ones.
        results: for each run of the request the one of ``runs`` that answers it.
        plain: index of the plain run of each condition.
        texts: row of each condition in the table of all groups' conditions; ``None`` names the unconditional one.
    """

    index: int
    request: DenoiserRequest
    runs: list[Run]
    results: list[int]
    plain: dict[str, int]
    texts: dict[str | None, int]

    def text(self, run: int, branch: int) -> int:
        """Row of the condition that a run's branch is denoised with."""
        return self.texts[self.runs[run].condition if branch == self.request.branches - 1 else None]


@dataclass(frozen=True)
class Row:
    """One row of a call.

    Attributes:
        key: what it computes.
        text: row of its condition in the table of conditions.
        parent: the row that it equals up to its first patched site, where it joins the batch; ``None`` for a row that
            is there from the start.
        patches: with the row that each copies from, where it copies from one; in the order in which they apply.
    """

    key: Key
    text: int
    parent: Key | None
    patches: tuple[tuple[Patch, Key | None], ...]


def distinct_runs(index: int, request: DenoiserRequest, texts: dict[str | None, int]) -> Group:
    """Runs that are the same computation once: a run without an effective patch is its base itself."""
    effective = [tuple(patch for patch in run if not patch.is_empty) for run in request.runs]
    names = ["clean", "corrupted", *request.bases]
    names += [patch.source for run in effective for patch in run if isinstance(patch.source, str)]
    plain = {name: index for index, name in enumerate(dict.fromkeys(names))}
    stops = [0] * len(plain)
    stops[plain["clean"]] = stops[plain["corrupted"]] = request.steps
    runs = [Run(name, index, (), 0, 0) for name, index in plain.items()]
    results = []
    for base_name, patches in zip(request.bases, effective, strict=True):
        base = plain[base_name]
        if not patches:
            stops[base] = request.steps
            results.append(base)
            continue
        start = min(min(_steps(patch, request.steps)) for patch in patches)
        stops[base] = max(stops[base], start + 1)
        for patch in patches:
            if isinstance(patch.source, str):
                source = plain[patch.source]
                stops[source] = max(stops[source], max(_steps(patch, request.steps)) + 1)
        results.append(len(runs))
        runs.append(Run(base_name, base, patches, start, request.steps))
    for place, stop in enumerate(stops):
        runs[place] = replace(runs[place], stop=stop)
    return Group(index, request, runs, results, plain, texts)


def _steps(patch: Patch, steps: int) -> tuple[int, ...] | range:
    return range(steps) if patch.steps is None else patch.steps


def free_rows(group: Group, step: int, joins: bool) -> tuple[list[Row], dict[Key, Key]]:
    """Rows of one group at one step of ``free``, and the keys whose output is another row's.

    At its first step a run has its base's latents. A branch of it that is not patched there is the base's row, and a
    patched one is the base's row up to its site. All plain runs start alike, so their first unconditional row is one.
    """
    request, index = group.request, group.index
    alias: dict[Key, Key] = {}
    rows = []
    for run_index, run in enumerate(group.runs):
        if not run.start <= step < run.stop:
            continue
        for branch in range(request.branches):
            key = (index, run_index, branch)
            base = (index, run.base, branch)
            patches = tuple(_patches_at(group, run, step, branch))
            forks = step == run.start and run.base != run_index
            if forks and not patches:
                alias[key] = base
            elif step == 0 and run_index and run.base == run_index and branch < request.branches - 1:
                alias[key] = (index, 0, branch)
            else:
                rows.append(Row(key, group.text(run_index, branch), base if forks and joins else None, patches))
    return _resolve(rows, alias)


def forced_rows(group: Group, step: int, joins: bool) -> tuple[list[Row], dict[Key, Key]]:
    """Rows of one group at one step of ``teacher_forced``, every run at equal latents.

    The corrupted run has all branches, for the next step's latents come of it; the others have the conditional one.
    """
    branch, index = group.request.branches - 1, group.index
    alias: dict[Key, Key] = {}
    rows = [Row((index, CORRUPTED, one), group.text(CORRUPTED, one), None, ()) for one in range(branch)]
    read = {0, CORRUPTED}
    for run_index, run in enumerate(group.runs):
        key, base = (index, run_index, branch), (index, run.base, branch)
        patches = tuple(_patches_at(group, run, step, branch))
        if run.base == run_index:
            rows.append(Row(key, group.text(run_index, branch), None, ()))
            continue
        if patches:
            rows.append(Row(key, group.text(run_index, branch), base if joins else None, patches))
            read |= {source[1] for _, source in patches if source is not None}
        else:
            alias[key] = base
        if not patches or joins:
            read.add(run.base)
    read |= set(group.results)
    return _resolve([row for row in rows if row.key[1] in read or row.patches], alias)


def _patches_at(group: Group, run: Run, step: int, branch: int) -> Iterator[tuple[Patch, Key | None]]:
    conditional = branch == group.request.branches - 1
    for patch in run.patches:
        wanted = patch.branch == "both" or (patch.branch == "cond") == conditional
        if group.request.branches == 1:
            wanted = True
        if wanted and (patch.steps is None or step in patch.steps):
            source = None
            if isinstance(patch.source, str):
                source = (group.index, group.plain[patch.source], branch)
            yield patch, source


def _resolve(rows: list[Row], alias: dict[Key, Key]) -> tuple[list[Row], dict[Key, Key]]:
    """Follow aliases in parents and sources, so that every key named there is a row's own."""

    def final(key: Key) -> Key:
        while key in alias:
            key = alias[key]
        return key

    resolved = [
        Row(
            row.key,
            row.text,
            None if row.parent is None else final(row.parent),
            tuple((patch, None if source is None else final(source)) for patch, source in row.patches),
        )
        for row in rows
    ]
    return resolved, {key: final(key) for key in alias}
