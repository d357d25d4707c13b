"""The loop that every training stage shares: a schedule in minutes, a moving average, and checkpoints that resume.

A stage is sized in minutes of its own work, not steps, so that it fits the machine it runs on; time spent stopped does
not count. Checkpoints are safetensors and JSON and are replaced in one move, so that a stage can be ended at any time.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LONGEST_STEP = 20.0  # seconds; a longer one was spent paused


class Loop:
    """Iterate over the steps of one stage; the body calls ``loop.backward(loss)``, which also steps the optimiser.

    The learning rate of each parameter group is its ``base_lr`` times a trapezoid: a warm-up over the first 1% of
    the minutes, flat, then linear to zero over the last ``cooldown`` of them. ``loop.average`` holds the exponential
    moving average of the parameters, fp32.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        work: Path,
        minutes: float,
        *,
        resume: bool = False,
        decay: float = 0.999,
        cooldown: float = 0.35,
        clip: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        self.name, self.module, self.optimizer, self.work = name, module, optimizer, work
        self.seconds, self.decay, self.cooldown, self.clip, self.max_steps = (
            minutes * 60,
            decay,
            cooldown,
            clip,
            max_steps,
        )
        self.step, self.elapsed, self.stopping, self.losses = 0, 0.0, False, [0.0, 0]
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        self.average = {key: value.detach().clone() for key, value in module.state_dict().items()}
        work.mkdir(parents=True, exist_ok=True)
        if resume and (work / f"{name}.json").exists():
            self._load()

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.seconds)

    def rate(self) -> float:
        """The factor on every base learning rate now."""
        return min(1.0, self.progress / 0.01 + 0.02, (1 - self.progress) / self.cooldown)

    def __iter__(self) -> Iterator[int]:
        previous = signal.signal(signal.SIGTERM, self._stop)
        clock = logged = saved = time.monotonic()
        try:
            while self.progress < 1 and not self.stopping and self.step != self.max_steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = group["base_lr"] * self.rate()
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.elapsed += min(now - clock, LONGEST_STEP)
                clock = now
                if now - logged > 15:
                    self._log()
                    logged = now
                if now - saved > 120:
                    self.save()
                    saved = time.monotonic()
            self._log()
            self.save()
        finally:
            signal.signal(signal.SIGTERM, previous)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, clip, step, average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.grad is not None], self.clip)
        self.optimizer.step()
        decay = min(self.decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            state = [(self.average[k], v) for k, v in self.module.state_dict().items() if v.is_floating_point()]
            torch._foreach_lerp_([mean for mean, _ in state], [value for _, value in state], 1 - decay)
        self.losses[0] += float(loss.detach())
        self.losses[1] += 1

    def load_average(self) -> None:
        """Put the moving average into the module."""
        self.module.load_state_dict(self.average)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _log(self) -> None:
        if not self.losses[1]:
            return
        path = self.work / f"{self.name}.csv"
        new = not path.exists()
        with path.open("a") as file:
            if new:
                file.write("step,minutes,learning_rate_factor,loss\n")
            file.write(f"{self.step},{self.elapsed / 60:.2f},{self.rate():.3f},{self.losses[0] / self.losses[1]:.6f}\n")
        self.losses = [0.0, 0]

    def save(self) -> None:
        """Write weights, average, optimiser state and position; a reader never sees half of them."""
        tensors = {f"now.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        save_tensors(tensors, self.work / f"{self.name}.safetensors")
        position = json.dumps({"step": self.step, "elapsed": self.elapsed})
        replace_text(self.work / f"{self.name}.json", position)

    def _load(self) -> None:
        tensors = load_file(self.work / f"{self.name}.safetensors")
        self.module.load_state_dict(strip(tensors, "now."))
        self.average = {k: v.clone() for k, v in strip(tensors, "average.").items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in strip(tensors, "optimizer.").items():
            index, _, field = key.partition(".")
            state.setdefault(int(index), {})[field] = value
        whole = self.optimizer.state_dict()
        base = [group["base_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["base_lr"] = lr
        position = json.loads((self.work / f"{self.name}.json").read_text())
        self.step, self.elapsed = position["step"], position["elapsed"]


def strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors by way of a temporary file."""
    part = path.with_suffix(".part")
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, part)
    os.replace(part, path)


def replace_text(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)
