"""Lockstep calls as one compiled graph: the plan's source maps are its inputs, so every mix of patches runs the same.

Graphs differ by the number of rows, of maps a site and of bank slots alone, each rounded up to a few values. Rows of
padding keep what they compute, and nobody reads it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.heads import with_heads
from ...models.registry import description_of
from ...models.unit import Dims, Forward
from ...ops.restore import KEEP, restore
from ..values import from_positions, to_positions
from .architectures import Shared
from .execute import Joins, execute
from .forward import CallInputs, Model, laid_out, time_of
from .packed_products import forget, with_packed_products
from .packing import BUCKET
from .patching import given_table
from .plan import CallPlan

_GRAPHS = 64
"""Most graphs of one model; beyond them torch would quietly run eagerly."""

Graph = Callable[..., Tensor]
Maps = dict[str, list[Tensor]]
Banks = dict[str, Tensor]

_graphs: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, tuple[str, ...]], Graph]] = weakref.WeakKeyDictionary()


class CompiledDenoiser:
    """The compiled graphs of a denoiser.

    Args:
        model: with units. Its shadow outlives the requests, and so do the graphs.
        shapes: shape of one row's value at every site that a plan may patch, ``(P, D)`` or ``(C, h, w)``.
        mode: of ``torch.compile``; ``None`` for its default.
    """

    def __init__(self, model: Model, shapes: dict[str, tuple[int, ...]], mode: str | None) -> None:
        self._model, self._shapes = model, shapes
        forget(model.given.module)
        weakref.finalize(self, forget, model.given.module)  # the graphs stay, a second set of weights does not
        kept = _graphs.setdefault(model.given.module, {})
        heads = tuple(name for name in shapes if model.description.sites[name].kind == "head")
        if (mode, heads) not in kept:
            kept[mode, heads] = torch.compile(_graph(model.given.module, heads), dynamic=False, mode=mode)
        self._graph = kept[mode, heads]
        self._dense: weakref.WeakKeyDictionary[CallPlan, tuple[Maps, Banks]] = weakref.WeakKeyDictionary()

    def __call__(self, inputs: CallInputs, plan: CallPlan) -> Tensor:
        """What the scheduler is given of each row of a plan in lockstep, ``[B, ...]``."""
        rows = len(plan.rows)
        padded = -(-rows // BUCKET) * BUCKET
        if plan not in self._dense:
            self._dense[plan] = self._maps(plan, padded), self._banks(plan, inputs)
        maps, banks = self._dense[plan]
        taken = torch.arange(padded, device=inputs.text.device).clamp(max=rows - 1)
        inputs = CallInputs(inputs.sample[taken], inputs.timestep, inputs.text[taken])
        with cache_folder(), torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            output = self._graph(
                laid_out(inputs.sample),
                inputs.text,
                time_of(self._model, inputs),
                self._model.given.dims,
                self._model.shared,
                maps,
                banks,
            )
        # A copy, since a captured graph writes its next output to the same memory.
        return self._model.given.denoiser.prediction(output[:rows]).clone()

    def _maps(self, plan: CallPlan, padded: int) -> Maps:
        """``[padded, P]`` source maps, as many at every site."""
        device = self._model.given.texts.embeds.device
        count = max((len(site.rounds) for site in plan.sites.values()), default=1)
        maps: Maps = {}
        for name, shape in self._shapes.items():
            positions = shape[0] if len(shape) == 2 else shape[1] * shape[2]
            rounds = plan.sites[name].rounds if name in plan.sites else []
            keep = torch.full((padded, positions), KEEP, dtype=torch.int32, device=device)
            maps[name] = [one.dense(padded) for one in rounds]
            maps[name] += [keep] * (max(1, count) - len(rounds))
        return maps

    def _banks(self, plan: CallPlan, inputs: CallInputs) -> Banks:
        """``[S, P, D]`` at every site with ``S`` a power of two; none at all where no site has a slot."""
        most = max((len(site.slots) for site in plan.sites.values()), default=0)
        if not most:
            return {}
        slots = 1 << (most - 1).bit_length()
        banks: Banks = {}
        for name, shape in self._shapes.items():
            like = inputs.sample.new_empty(1, *shape)
            bank = like.new_zeros(slots, *to_positions(like).shape[1:])
            for number, slot in enumerate(plan.sites[name].slots if name in plan.sites else ()):
                assert not isinstance(slot, tuple)
                bank[number] = given_table(slot, like)
            banks[name] = bank
        return banks


def _graph(model: Any, heads: Sequence[str]) -> Graph:
    plain = description_of(with_packed_products(model))
    assert plain is not None, "only models that have a description are compiled"
    description = with_heads(plain, heads)

    def graph(
        sample: Tensor,
        text: Tensor,
        time: Tensor,
        dims: Dims,
        shared: Shared,
        maps: Maps,
        banks: Banks,
    ) -> Tensor:
        def at_site(site: str, value: Tensor) -> Tensor:
            channels = description.sites[site].channels
            own = value if channels is None else value[..., channels]
            for codes in maps.get(site, ()):
                own = from_positions(restore(to_positions(own), codes, banks.get(site)), own)
            if channels is None:
                return own
            return torch.cat([value[..., : channels.start], own, value[..., channels.stop :]], dim=-1)

        forward = Forward(dims, shared, {"time": time, "text": text}, sample.shape[0])
        return execute(description, forward, {"sample": sample}, at_site, Joins(), {})[0]

    return graph


@contextlib.contextmanager
def cache_folder() -> Iterator[None]:
    """Compiled code is kept between processes: in the user's cache folder, unless the user has named another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    # Torch puts its own default there, a folder for temporary files, when its compiler is first imported.
    if before not in (None, default_cache_dir()):
        yield
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ[name] = str(Path(base) / "fasttrace" / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
