"""nnsight's Envoys as addresses of sites, and a backend that reports what a trace of one's own costs.

An nnsight trace is compiled Python, not a list of patches, so it cannot be batched from outside. What can: the sites
that a script names with Envoys (``model.unet.mid_block.attentions[0]``) are sites here, and a sweep over them is one
call; and a script's own trace can be run under `CostBackend` to see where its time goes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight.tracing.backend import Backend as _NnsightBackend
from torch import nn

from ..engine.values import first
from ..errors import BackendError, SiteError
from ..patch import Patch, Source
from ..profile.flops import flop_counter
from ..sites import Site, discover_sites, find_site, part_sites, unet_blocks
from .plain import plain


def pipeline_of(model: Any) -> Any:
    """A pipeline over the weights of nnsight's ``DiffusionModel``, without what nnsight has put on its modules.

    Raises:
        BackendError: no diffusion model, or one whose weights are not loaded.
    """
    pipeline = getattr(getattr(model, "_module", None), "pipeline", None)
    if pipeline is None:
        raise BackendError(f"{type(model).__name__} holds no pipeline: expected nnsight.DiffusionModel(...)")
    if pipeline.unet.device.type == "meta":
        raise BackendError("the model's weights are not loaded yet: create it with dispatch=True")
    own = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            setattr(own, name, plain(component))
    return own


def site_of(model: Any, envoy: Any, head: int | None = None) -> Site:
    """The site that an Envoy stands for.

    Args:
        model: nnsight's model, diffusion or language.
        envoy: an Envoy of it.
        head: a head of the text attention that the Envoy stands for: its share of the input of the output projection
            (in a script, ``attn.c_proj.input[..., head * d : (head + 1) * d]``).

    Raises:
        SiteError: the Envoy's module is none that can be patched, or has no such head.
    """
    module = envoy._module
    for site in _all_sites(model):
        if site.module is module:
            return site if head is None else _head_of(model, site, head)
    raise SiteError(f"{envoy.path} ({type(module).__name__}) is no site: name a resnet, attention, MLP or whole layer")


def _head_of(model: Any, attention: Site, head: int) -> Site:
    pipeline = getattr(model._module, "pipeline", None)
    return find_site(model._module if pipeline is None else pipeline, f"{attention.name}.heads.{head}")


def patches(
    model: Any,
    envoys: Iterable[Any],
    positions: str | Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    source: Source = "clean",
) -> list[Patch]:
    """One patch an Envoy, for ``fasttrace.trace_text`` and ``fasttrace.trace_unet``; see `fasttrace.Patch`."""
    return [Patch(site_of(model, envoy), positions, steps, source=source) for envoy in envoys]


def sweep(model: Any, envoys: Iterable[Any], prompts: Sequence[Any], **study: Any) -> Any:
    """A study over the sites that Envoys name.

    Args:
        model: nnsight's ``DiffusionModel``.
        envoys: Envoys of its UNet or text encoders.
        prompts: a list of `fasttrace.Prompt`.
        **study: further arguments of `fasttrace.Study`.

    Returns:
        `fasttrace.Effects`.
    """
    from ..study.run import run
    from ..study.study import Study

    names = [site_of(model, envoy).name for envoy in envoys]
    return run(Study(pipeline_of(model), prompts=list(prompts), sites=names, **study))


def _all_sites(model: Any) -> list[Site]:
    root = getattr(model, "_module", None)
    pipeline = getattr(root, "pipeline", None)
    if pipeline is not None:
        return [*discover_sites(pipeline), *unet_blocks(pipeline)]
    if not isinstance(root, nn.Module):
        raise BackendError(f"{type(model).__name__} is no nnsight model: expected an Envoy at the root of a model")
    return part_sites(root, "model")


@dataclass
class Cost:
    """What one trace cost.

    Attributes:
        seconds: wall clock, the user's own code in the block included.
        flops: multiply-adds count two; matrix products and convolutions only.
        forwards: calls of each site's module.
        rows: rows of these calls' batches, in all.
    """

    seconds: float = 0.0
    flops: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line."""
        calls, rows = (max(table.values(), default=0) for table in (self.forwards, self.rows))
        rate = self.flops / self.seconds / 1e9 if self.seconds else 0.0
        return (
            f"{self.seconds:.3f} s, {self.flops / 1e9:.2f} GFLOP ({rate:.1f} GFLOP/s), {len(self.forwards)} sites, "
            f"at most {calls} calls and {rows} rows of one"
        )


class CostBackend(_NnsightBackend):
    """Runs a trace in place and fills `cost`: ``with model.trace(prompt, backend=CostBackend(model)): ...``."""

    def __init__(self, model: Any) -> None:
        self.cost = Cost()
        self._sites = _all_sites(model)

    def __call__(self, tracer: Any) -> None:
        self.cost = Cost()
        handles = [site.module.register_forward_hook(self._counter(site.name)) for site in self._sites]
        counter = flop_counter()
        started = time.perf_counter()
        try:
            with counter:
                super().__call__(tracer)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            self.cost.seconds = time.perf_counter() - started
            self.cost.flops = counter.get_total_flops()
            for handle in handles:
                handle.remove()

    def _counter(self, name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            self.cost.forwards[name] = self.cost.forwards.get(name, 0) + 1
            self.cost.rows[name] = self.cost.rows.get(name, 0) + len(first(output))

        return count
