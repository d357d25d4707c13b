"""Where the time of a UNet call goes: by kind of site and by batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.denoise.shadow import clone, shadow_of
from ..engine.values import first
from ..pipeline import encode_prompt, latent_shape, needs_added
from ..sites import part_sites
from .ceilings import Ceilings, seconds_of
from .flops import flop_counter
from .live import live_bytes
from .peak import peak_of

KIND_ORDER = ("resnet", "self_attn", "cross_attn", "mlp", "other")


@dataclass(frozen=True)
class KindCost:
    """All sites of one kind, for one sample in one UNet call.

    Attributes:
        kind: of site; ``"other"`` is everything between the sites: norms, projections, samplers, time embedding.
        sites: how many.
        seconds: measured, per sample.
        flops: per sample.
        moved: bytes that must be read and written once: weights (shared by the batch), inputs and outputs.
        floor: seconds per sample at the machine's ceilings.
        held: bytes of tensors that one such site holds at most for a sample, its inputs apart; of ``"other"``, those of
            the whole call, skip connections included.
        values: bytes of the sites' own values for one sample: what a cache of a clean run would keep for each step.
    """

    kind: str
    sites: int
    seconds: float
    flops: float
    moved: float
    floor: float
    held: int
    values: int


@dataclass(frozen=True)
class BatchPoint:
    """One batch size.

    Attributes:
        batch: samples in a call.
        seconds: of a whole UNet call.
        peak_bytes: most memory that a call takes beside what was held before; ``None`` where the system does not say.
    """

    batch: int
    seconds: float
    peak_bytes: int | None

    @property
    def per_sample(self) -> float:
        """Seconds of a call for one of its samples."""
        return self.seconds / self.batch


class UNetCaller:
    """Calls a pipeline's UNet on random inputs of the true shapes, on a structure that shares the user's weights."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.unet: Any = shadow_of(pipe.unet, pipe.unet.dtype)
        self._condition = encode_prompt(pipe, "a photo of an apple")

    @torch.no_grad()
    def __call__(self, batch: int) -> Tensor:
        """The predicted noise ``[batch, C, h, w]``."""
        output: Tensor = self.unet(**self.inputs(batch))[0]
        return output

    def inputs(self, batch: int) -> dict[str, Any]:
        """The arguments of a call: latents ``[batch, C, h, w]`` and text ``[batch, T, D]`` on the UNet's device."""
        unet = self._pipe.unet
        generator = torch.Generator().manual_seed(batch)
        latents = torch.randn(batch, *latent_shape(self._pipe), generator=generator).to(unet.device, unet.dtype)
        condition = self._condition.to(unet.device, unet.dtype)
        added = None
        if needs_added(self._pipe):
            assert condition.pooled is not None
            assert condition.time_ids is not None
            added = {
                "text_embeds": condition.pooled.expand(batch, -1),
                "time_ids": condition.time_ids.expand(batch, -1),
            }
        return {
            "sample": latents,
            "timestep": torch.tensor(500, device=unet.device),
            "encoder_hidden_states": condition.embeds.expand(batch, -1, -1),
            "added_cond_kwargs": added,
            "return_dict": False,
        }


LARGEST_BATCH = 64


def batch_curve(call: UNetCaller, budget: float, largest: int = LARGEST_BATCH) -> list[BatchPoint]:
    """Seconds and memory of a call at batch sizes 1, 2, 4, ...: as many as ``budget`` seconds allow, two always.

    A call that takes long is timed once, a short one as the median of three after a first.
    """
    points: list[BatchPoint] = []
    left, batch = budget, 1
    call(1)
    while batch <= largest:
        started = time.perf_counter()
        peak = peak_of(lambda: call(batch))[1]  # noqa: B023
        seconds = time.perf_counter() - started
        if seconds < budget / 40:
            seconds = seconds_of(lambda: call(batch), rounds=3, warmup=0)  # noqa: B023
        points.append(BatchPoint(batch, seconds, peak))
        left -= time.perf_counter() - started
        batch *= 2
        if len(points) > 1 and 2 * seconds > left:
            break
    return points


def kind_costs(call: UNetCaller, batch: int, ceilings: Ceilings, rounds: int) -> list[KindCost]:
    """Time, operations, traffic and memory of each kind of site in a call.

    Args:
        call: calls the UNet.
        batch: samples of the calls that are timed.
        ceilings: of the machine, for the floors.
        rounds: calls; times are medians over them.

    Returns:
        Kinds in the order of `KIND_ORDER`, what lies between the sites last.
    """
    own: Any = clone(call.unet)
    sites = part_sites(own, "unet")
    modules = {site.name: site.module for site in sites}
    held, all_held = live_bytes(lambda: own(**call.inputs(1)), modules)
    timer = _Timer()
    with timer.on(modules), torch.no_grad():
        whole = seconds_of(lambda: own(**call.inputs(batch)), rounds, warmup=0)
    seconds = {name: sorted(times)[rounds // 2] for name, times in timer.seconds.items()}
    by_module, all_flops = _flops(own, call)
    weight_bytes = {site.name: _bytes(site.module) for site in sites}
    costs = []
    for kind in KIND_ORDER[:-1]:
        mine = [site.name for site in sites if site.kind == kind]
        if mine:
            flops = sum(by_module[name] for name in mine)
            moved = sum(timer.traffic[name] + weight_bytes[name] for name in mine) / batch
            measured = sum(seconds[name] for name in mine) / batch
            values = sum(timer.values[name] for name in mine) // batch
            floor = ceilings.floor(flops, moved)
            most = max(held[name] for name in mine)
            costs.append(KindCost(kind, len(mine), measured, flops, moved, floor, most, values))
    rest = max(whole / batch - sum(cost.seconds for cost in costs), 0.0)
    flops = all_flops - sum(cost.flops for cost in costs)
    moved = (_bytes(own) - sum(weight_bytes.values())) / batch
    return [*costs, KindCost("other", 0, rest, flops, moved, ceilings.floor(flops, moved), all_held, 0)]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _flops(unet: Any, call: UNetCaller) -> tuple[dict[str, float], float]:
    """Operations of each site and of a whole forward of one sample, counted on the meta device: nothing is computed."""
    hollow: Any = clone(unet)
    for owner in hollow.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = torch.empty_like(tensor, device="meta")
    counter = flop_counter()
    counts: dict[str, float] = {}

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(name, -float(counter.get_total_flops()))

    def end(name: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(name, counts[name] + float(counter.get_total_flops()))

    for site in part_sites(hollow, "unet"):
        site.module.register_forward_pre_hook(begin(site.name))
        site.module.register_forward_hook(end(site.name))
    inputs = call.inputs(1)
    inputs = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if value is not None
    }
    if "added_cond_kwargs" in inputs:
        inputs["added_cond_kwargs"] = {name: value.to("meta") for name, value in inputs["added_cond_kwargs"].items()}
    with counter, torch.no_grad():
        hollow(**inputs)
    return counts, float(counter.get_total_flops())


class _Timer:
    """Seconds of each call of some modules, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.traffic: dict[str, int] = {}
        self.values: dict[str, int] = {}
        self._started = 0.0

    @contextmanager
    def on(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(self._begin))
            handles.append(module.register_forward_hook(self._end(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._started = time.perf_counter()

    def _end(self, name: str) -> Any:
        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.setdefault(name, []).append(time.perf_counter() - self._started)
            inputs = [value for value in args if isinstance(value, Tensor)]
            self.values[name] = first(output).nbytes
            self.traffic[name] = self.values[name] + sum(value.nbytes for value in inputs)

        return end
