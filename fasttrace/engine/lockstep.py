"""Denoising runs in lockstep: all runs of all groups take a step together, in as few UNet calls as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .trajectory import Trajectories
from .unet_calls import UNetCalls
from .unet_request import UNetRequest
from .unet_runs import Group, Key, Row, corrupted_alone, distinct_runs, forced_rows, free_rows, waves

Progress = Callable[[int], None]
Output = tuple[Tensor, Tensor, Tensor]


def trace_unet_lockstep(request: UNetRequest) -> Output:
    """Clean, corrupted and restored, as `fasttrace.engine.unet.UNetTrace` describes them."""
    return trace_groups([request])[0]


def trace_groups(requests: Sequence[UNetRequest], progress: Progress | None = None) -> list[Output]:
    """One trace for each of some requests that share pipeline, steps, guidance and protocol."""
    calls = UNetCalls(requests, progress)
    groups = [distinct_runs(index, request, calls.texts_of[index]) for index, request in enumerate(requests)]
    outputs = _teacher_forced(groups, calls) if requests[0].protocol == "teacher_forced" else _free(groups, calls)
    traces = []
    for group, values in zip(groups, outputs, strict=True):
        restored = values[group.results] if group.results else values.new_empty(0, *values.shape[1:])
        traces.append((values[0], values[1], restored))
    return traces


def _free(groups: Sequence[Group], calls: UNetCalls) -> list[Tensor]:
    """Final latents of every run of every group, ``[runs, C, h, w]`` each."""
    lanes = [Lane(group) for group in groups]
    for step in range(groups[0].request.steps):
        _advance(lanes, step, calls)
    return [lane.final() for lane in lanes]


def _advance(lanes: Sequence[Lane], step: int, calls: UNetCalls) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """One step of every run that has begun; returns what the UNet read and what it said."""
    rows: list[Row] = []
    alias: dict[Key, Key] = {}
    inputs: dict[Key, Tensor] = {}
    timesteps: dict[Key, Tensor] = {}
    timestep = lanes[0].trajectories.timesteps[step]
    for lane in lanes:
        lane.fork(step)
        own, same = free_rows(lane.group, step, calls.joins)
        rows += own
        alias |= same
        inputs |= lane.inputs(step)
        timesteps |= dict.fromkeys((row.key for row in own), timestep)
    outputs = calls.run(rows, inputs, timesteps)
    outputs |= {key: outputs[same] for key, same in alias.items()}
    for lane in lanes:
        lane.advance(step, outputs)
    return inputs, outputs


class Lane:
    """The trajectories of one group's runs that have begun."""

    def __init__(self, group: Group) -> None:
        self.group = group
        request = group.request
        self._runs = [number for number, run in enumerate(group.runs) if run.base == number]
        self.trajectories = Trajectories(
            request.pipe.scheduler,
            request.num_inference_steps,
            request.latents,
            request.new_generator(),
            len(self._runs),
            request.eta,
        )

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

    def _key(self, run: int, branch: int) -> Key:
        return self.group.index, run, branch, 0

    def inputs(self, step: int) -> dict[Key, Tensor]:
        """What the UNet reads, for each run and branch."""
        scaled = self.trajectories.model_input(step)
        pairs = zip(self._runs, scaled, strict=True)
        return {self._key(run, branch): row for run, row in pairs for branch in range(self.group.request.branches)}

    def advance(self, step: int, outputs: dict[Key, Tensor]) -> None:
        """Guide and take the scheduler's step."""
        request = self.group.request
        branches = [
            torch.stack([outputs[self._key(number, branch)] for number in self._runs])
            for branch in range(request.branches)
        ]
        output = branches[-1]
        if request.branches == 2:
            output = branches[0] + request.guidance_scale * (branches[1] - branches[0])
        self.trajectories.advance(step, output)

    def final(self) -> Tensor:
        """Latents of every run; zeros for a source that nothing reads to the end."""
        latents = self.trajectories.latents
        result = latents.new_zeros(len(self.group.runs), *latents.shape[1:])
        result[self._runs] = latents
        return result


def _teacher_forced(groups: Sequence[Group], calls: UNetCalls) -> list[Tensor]:
    """Conditional outputs of every run of every group, ``[runs, S, C, h, w]`` each."""
    request = groups[0].request
    branch = request.branches - 1
    lanes = [Lane(corrupted_alone(group)) for group in groups]
    parts: list[list[Row]] = []
    alias: dict[Key, Key] = {}
    inputs: dict[Key, Tensor] = {}
    timesteps: dict[Key, Tensor] = {}
    outputs: dict[Key, Tensor] = {}
    for step in range(request.steps):
        read, said = _advance(lanes, step, calls)
        timestep = lanes[0].trajectories.timesteps[step]
        parts.append([])
        for group in groups:
            outputs[group.index, 1, branch, step] = said[group.index, 0, branch, 0]
            own, same = forced_rows(group, step, calls.joins)
            parts[-1] += own
            alias |= same
            inputs |= {row.key: read[group.index, 0, branch, 0] for row in own}
            timesteps |= dict.fromkeys((row.key for row in own), timestep)
    # Steps are independent now that the trajectory is known, so their rows share calls.
    for rows in waves(parts, calls.parents):
        outputs = calls.run(rows, inputs, timesteps) | outputs
    outputs |= {key: outputs[same] for key, same in alias.items()}
    return [_by_run(group, branch, outputs) for group in groups]


def _by_run(group: Group, branch: int, outputs: dict[Key, Tensor]) -> Tensor:
    """``[runs, S, C, h, w]``; zeros for a source at a step where nothing reads it."""
    steps = range(group.request.steps)
    zero = torch.zeros_like(outputs[group.index, 0, branch, 0])
    return torch.stack(
        [
            torch.stack([outputs.get((group.index, run, branch, step), zero) for step in steps])
            for run in range(len(group.runs))
        ]
    )
