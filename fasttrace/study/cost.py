"""What a study will cost: counted from its plan, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.denoise.calls import batch_size
from ..engine.denoise.trace import UNetPlanSummary, plan_summary
from .groups import Group, PromptPlan
from .job import Job, Options
from .settings import INJECT, Settings


@dataclass(frozen=True)
class Estimate:
    """Counts of a whole study.

    Attributes:
        groups: (prompt, seed, noise sample) triples.
        runs: restored runs of the table.
        distinct: those of them that have to be denoised.
        text_runs: distinct text patches of all prompts and noise samples.
        forwards: UNet forwards of one row that the plan needs.
        naive: the same with a clean, a corrupted and a restored run for each row of the table.
        tflop: of ``forwards``, in 10^12 operations.
        naive_tflop: of ``naive``.
        calls: UNet calls, where no two groups share one.
        batch: most rows of one UNet call.
        memory_bytes: expected peak beside the weights.
    """

    groups: int
    runs: int
    distinct: int
    text_runs: int
    forwards: float
    naive: int
    tflop: float
    naive_tflop: float
    calls: int
    batch: int
    memory_bytes: int

    def text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.groups} groups (prompt, seed, noise sample), {self.runs} restored runs",
            f"{self.text_runs} patched text encodings",
        ]
        if self.naive:
            saved = self.naive / self.forwards
            lines.append(f"{self.distinct} restored runs to denoise; the others equal one of them, or their base")
            lines.append(
                f"{self.forwards:,.0f} UNet forwards, {self.tflop:,.1f} TFLOP; clean, corrupted and restored anew for "
                f"each run: {self.naive:,} forwards, {self.naive_tflop:,.1f} TFLOP ({saved:.1f}x)"
            )
            lines.append(
                f"about {self.calls:,} UNet calls of up to {self.batch} rows, and {self.memory_bytes / 2**20:,.0f} MiB "
                "beside the weights"
            )
        else:
            lines.append("no denoising: no metric needs pictures")
        return "\n".join(lines)


def estimate(study: Settings, prompts: Sequence[PromptPlan], groups: Sequence[Group]) -> Estimate:
    """Count groups, runs, UNet forwards, operations and memory of a study; no forward pass of the UNet."""
    forwards, naive, tflop, naive_tflop, calls, batch, memory = 0.0, 0, 0.0, 0.0, 0, 0, 0
    job = Job(study, Options()) if study.needs_unet else None
    # Prompts differ in how many of their runs are distinct, and in nothing else that costs.
    counted: dict[tuple[int, int], UNetPlanSummary] = {}
    for prompt in prompts if job is not None else ():
        assert job is not None
        count, key = sum(group.plan is prompt for group in groups), (len(prompt.texts), len(prompt.distinct))
        if key not in counted:
            request = job.example_request(prompt)
            counted[key] = plan_summary([request])
            one, batch = request.steps * request.branches, batch_size(request).rows
        summary = counted[key]
        injected = len(prompt.distinct) * one if study.source.startswith(INJECT) else 0
        rows, common = summary.forwards + injected, 3 * len(prompt.runs) * one
        forwards += count * rows
        naive += count * common
        tflop += count * summary.tflop * rows / summary.forwards
        naive_tflop += count * summary.tflop * common / summary.forwards
        calls += count * math.ceil((summary.rows + injected) / batch)
        memory = max(memory, summary.memory_bytes)
    return Estimate(
        groups=len(groups),
        runs=sum(len(group.plan.runs) for group in groups),
        distinct=sum(len(group.plan.distinct) for group in groups) if job is not None else 0,
        text_runs=sum(len(one.texts) for one in prompts) * study.corruption.samples,
        forwards=forwards,
        naive=naive,
        tflop=tflop,
        naive_tflop=naive_tflop,
        calls=calls,
        batch=batch,
        memory_bytes=memory,
    )
