"""What a study will cost: counted from its plan, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan
from ..study import INJECT
from .job import Job, Options
from .unet import plan_summary


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
        memory_bytes: expected peak beside the weights, for one group.
    """

    groups: int
    runs: int
    distinct: int
    text_runs: int
    forwards: float
    naive: int
    tflop: float
    naive_tflop: float
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
            lines.append(f"about {self.memory_bytes / 2**20:,.0f} MiB beside the weights, for each group in a batch")
        else:
            lines.append("no denoising: no metric needs pictures")
        return "\n".join(lines)


def estimate(plan: Plan) -> Estimate:
    """Count groups, runs, UNet forwards, operations and memory of a study; no forward pass of the UNet."""
    study, groups = plan.study, plan.groups
    forwards, naive, tflop, naive_tflop, memory = 0.0, 0, 0.0, 0.0, 0
    job = Job(plan, Options()) if study.needs_unet else None
    for prompt in plan.prompts if job is not None else ():
        count = sum(group.plan is prompt for group in groups)
        assert job is not None
        request = job.example_request(prompt)
        summary = plan_summary([request])
        one = request.steps * request.branches
        rows: float = summary.forwards + (len(prompt.distinct) * one if study.source.startswith(INJECT) else 0)
        common = 3 * len(prompt.runs) * one
        forwards += count * rows
        naive += count * common
        tflop += count * summary.tflop * rows / summary.forwards
        naive_tflop += count * summary.tflop * common / summary.forwards
        memory = max(memory, summary.memory_bytes)
    return Estimate(
        groups=len(groups),
        runs=plan.run_count,
        distinct=sum(len(group.plan.distinct) for group in groups) if job is not None else 0,
        text_runs=sum(len(one.texts) for one in plan.prompts) * study.corruption.samples,
        forwards=forwards,
        naive=naive,
        tflop=tflop,
        naive_tflop=naive_tflop,
        memory_bytes=memory,
    )
