"""The plan of a study: every group of runs, and what they will cost. It holds no tensor, and makes no forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cost import Estimate, estimate
from .groups import Group, PromptPlan, prompt_plan
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """All runs of a study: see `PromptPlan` and `Group`. Prompts stand in the order of their ids."""

    study: Settings
    prompts: tuple[PromptPlan, ...]

    @property
    def groups(self) -> list[Group]:
        """In the order of prompt, seed, noise sample: the order of the table, however the prompts were given.

        Where no metric needs denoising the seed changes nothing, and each prompt's first one stands for all.
        """
        return list(self._groups())

    def _groups(self) -> Iterator[Group]:
        for plan in self.prompts:
            seeds = sorted(self.study.seeds_of(plan.prompt))
            for seed in seeds if self.study.needs_unet else seeds[:1]:
                for sample in range(self.study.corruption.samples):
                    yield Group(plan, seed, sample)

    @property
    def run_count(self) -> int:
        """Restored runs in all groups, those included that cost nothing."""
        return sum(len(group.plan.runs) for group in self.groups)

    def estimate(self) -> Estimate:
        """What the study will cost; no forward pass."""
        return estimate(self.study, self.prompts, self.groups)

    def summary(self) -> str:
        """Runs, batches, UNet forwards and TFLOP beside the naive count, and memory, as text."""
        return self.estimate().text()


def make_plan(study: Settings) -> Plan:
    """Enumerate the runs of a study.

    Raises:
        StudyError: a role that a prompt does not have, or positions beyond its tokens.
    """
    prompts = sorted(study.prompts, key=lambda prompt: prompt.id)
    return Plan(study, tuple(prompt_plan(study, prompt) for prompt in prompts))
