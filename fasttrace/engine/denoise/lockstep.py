"""Denoising runs in lockstep: all runs of all groups take a step together, in as few calls as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..requests.denoise import DenoiserRequest
from .calls import DenoiserCalls
from .runs import CORRUPTED, Group, Key, Row, distinct_runs, forced_rows, free_rows
from .trajectory import Trajectories

Progress = Callable[[int], None]
Output = tuple[Tensor, Tensor, Tensor, Tensor | None]


def trace_lockstep(request: DenoiserRequest) -> Output:
    """Clean, corrupted, restored and inputs, as `fasttrace.engine.denoise.trace.DenoiserTrace` describes them."""
    return trace_groups([request])[0]


def trace_groups(requests: Sequence[DenoiserRequest], progress: Progress | None = None) -> list[Output]:
    """One trace for each of some requests that share pipeline, steps, guidance and protocol."""
    calls = DenoiserCalls(requests, progress)
    groups = [distinct_runs(index, request, calls.texts_of[index]) for index, request in enumerate(requests)]
    outputs = _teacher_forced(groups, calls) if requests[0].protocol == "teacher_forced" else _free(groups, calls)
    traces = []
    for group, (values, inputs) in zip(groups, outputs, strict=True):
        restored = values[group.results] if group.results else values.new_empty(0, *values.shape[1:])
        traces.append((values[0], values[CORRUPTED], restored, inputs))
    return traces


def _free(groups: Sequence[Group], calls: DenoiserCalls) -> list[tuple[Tensor, Tensor | None]]:
    """Final latents of every run of every group, ``[runs, ...]`` each, beside no inputs in common."""
    lanes = [Lane(group, [number for number, run in enumerate(group.runs) if run.base == number]) for group in groups]
    for step in range(groups[0].request.steps):
        rows: list[Row] = []
        alias: dict[Key, Key] = {}
        inputs: dict[Key, Tensor] = {}
        for lane in lanes:
            lane.fork(step)
            own, same = free_rows(lane.group, step, calls.joins)
            latents = lane.inputs(step)
            rows += own
            alias |= same
            inputs |= {row.key: latents[row.key[1]] for row in own}
        _advance(lanes, step, calls.run(rows, inputs, lanes[0].timestep(step)), alias)
    return [(lane.final(), None) for lane in lanes]


def _teacher_forced(groups: Sequence[Group], calls: DenoiserCalls) -> list[tuple[Tensor, Tensor | None]]:
    """Conditional outputs of every run of every group, ``[runs, S, ...]`` each, and their inputs ``[S, ...]``.

    Only the corrupted run takes the scheduler's steps. Its rows alone would be calls too small to be fast, so all
    others, which read the same latents, are in them.
    """
    lanes = [Lane(group, [CORRUPTED]) for group in groups]
    outputs: list[list[Tensor]] = [[] for _ in groups]
    read: list[list[Tensor]] = [[] for _ in groups]
    for step in range(groups[0].request.steps):
        rows: list[Row] = []
        alias: dict[Key, Key] = {}
        inputs: dict[Key, Tensor] = {}
        for lane, of_group in zip(lanes, read, strict=True):
            own, same = forced_rows(lane.group, step, calls.joins)
            rows += own
            alias |= same
            of_group.append(lane.inputs(step)[CORRUPTED])
            inputs |= dict.fromkeys((row.key for row in own), of_group[-1])
        said = _advance(lanes, step, calls.run(rows, inputs, lanes[0].timestep(step)), alias)
        for group, of_group in zip(groups, outputs, strict=True):
            of_group.append(_by_run(group, said))
    return [(torch.stack(said, dim=1), torch.stack(seen)) for said, seen in zip(outputs, read, strict=True)]


def _advance(lanes: Sequence[Lane], step: int, outputs: dict[Key, Tensor], alias: dict[Key, Key]) -> dict[Key, Tensor]:
    """Take the scheduler's step; returns the outputs of the aliases too."""
    outputs |= {key: outputs[same] for key, same in alias.items()}
    for lane in lanes:
        lane.advance(step, outputs)
    return outputs


def _by_run(group: Group, outputs: dict[Key, Tensor]) -> Tensor:
    """Conditional outputs ``[runs, ...]``; zeros for a source that nothing reads."""
    branch = group.request.branches - 1
    zero = torch.zeros_like(outputs[group.index, CORRUPTED, branch])
    return torch.stack([outputs.get((group.index, run, branch), zero) for run in range(len(group.runs))])


class Lane:
    """The trajectories of some of a group's runs, of those that have begun.

    Args:
        group: whose.
        runs: those that begin at once.
    """

    def __init__(self, group: Group, runs: list[int]) -> None:
        self.group = group
        request = group.request
        self._runs = runs
        self.trajectories = Trajectories(
            request.pipe.scheduler,
            request.num_inference_steps,
            request.latents,
            request.new_generator(),
            len(self._runs),
            request.eta,
            request.flow,
        )

    def timestep(self, step: int) -> Tensor:
        return self.trajectories.timesteps[step]

    def fork(self, step: int) -> None:
        """Drop the runs that nothing reads any more, and begin those whose first patched step this is."""
        runs = self.group.runs
        kept = [number for number in self._runs if runs[number].stop > step]
        begun = [number for number, run in enumerate(runs) if run.base != number and run.start == step]
        if not begun and len(kept) == len(self._runs):
            return
        place = {number: row for row, number in enumerate(self._runs)}
        rows = [place[number] for number in kept] + [place[runs[number].base] for number in begun]
        self.trajectories = self.trajectories.select(rows)
        self._runs = kept + begun

    def inputs(self, step: int) -> dict[int, Tensor]:
        """What the denoiser reads, in each run."""
        return dict(zip(self._runs, self.trajectories.model_input(step), strict=True))

    def advance(self, step: int, outputs: dict[Key, Tensor]) -> None:
        """Guide and take the scheduler's step."""
        request = self.group.request
        branches = [
            torch.stack([outputs[self.group.index, number, branch] for number in self._runs])
            for branch in range(request.branches)
        ]
        output = branches[-1]
        if request.branches == 2:
            output = branches[0] + request.cfg_scale * (branches[1] - branches[0])
        self.trajectories.advance(step, output)

    def final(self) -> Tensor:
        """Latents of every run; zeros for a source that nothing reads to the end."""
        latents = self.trajectories.latents
        result = latents.new_zeros(len(self.group.runs), *latents.shape[1:])
        result[self._runs] = latents
        return result
