"""Lockstep calls as one compiled graph: the plan's source maps are its inputs, so every mix of patches runs the same.

Graphs differ by the number of rows, of maps a site and of bank slots alone, each rounded up to a few values. Rows of
padding keep what they compute, and nobody reads it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.unet import describe_unet
from ...ops.restore import KEEP, restore
from ..values import from_positions, to_positions
from .execute import Joins, execute
from .forward import CallInputs, Model, Texts, time_of, unet_forward
from .packed_products import forget, with_packed_products
from .packing import BUCKET
from .patching import given_table
from .plan import CallPlan

_GRAPHS = 64
"""Most graphs of one UNet; beyond them torch would quietly run eagerly."""

Graph = Callable[..., Tensor]
Maps = dict[str, list[Tensor]]
Banks = dict[str, Tensor]

_graphs: weakref.WeakKeyDictionary[Any, dict[str | None, Graph]] = weakref.WeakKeyDictionary()


class CompiledUNet:
    """The compiled graphs of a UNet.

    Args:
        model: with units. Its shadow outlives the requests, and so do the graphs.
        shapes: shape of one row's value at every site that a plan may patch, ``(P, D)`` or ``(C, h, w)``.
        mode: of ``torch.compile``; ``None`` for its default.
    """

    def __init__(self, model: Model, shapes: dict[str, tuple[int, ...]], mode: str | None) -> None:
        self._model, self._shapes = model, shapes
        forget(model.unet)
        weakref.finalize(self, forget, model.unet)  # the graphs stay, a second set of weights does not
        kept = _graphs.setdefault(model.unet, {})
        if mode not in kept:
            kept[mode] = torch.compile(_graph(model.unet), dynamic=False, mode=mode)
        self._graph = kept[mode]
        self._dense: weakref.WeakKeyDictionary[CallPlan, tuple[Maps, Banks]] = weakref.WeakKeyDictionary()

    def __call__(self, inputs: CallInputs, plan: CallPlan) -> Tensor:
        """The UNet's output ``[B, C, h, w]`` for a plan in lockstep."""
        rows = len(plan.rows)
        padded = -(-rows // BUCKET) * BUCKET
        if plan not in self._dense:
            self._dense[plan] = self._maps(plan, padded), self._banks(plan, inputs)
        maps, banks = self._dense[plan]
        taken = torch.arange(padded, device=inputs.text.device).clamp(max=rows - 1)
        inputs = CallInputs(inputs.sample[taken], inputs.timestep, inputs.text[taken])
        with cache_folder(), torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            output = self._graph(
                inputs.sample.contiguous(memory_format=torch.channels_last),
                inputs.text,
                time_of(self._model, inputs),
                self._model.texts.embeds,
                self._model.keys,
                maps,
                banks,
            )
        # A copy, since a captured graph writes its next output to the same memory.
        return output[:rows].clone()

    def _maps(self, plan: CallPlan, padded: int) -> Maps:
        """``[padded, P]`` source maps, as many at every site."""
        device = self._model.texts.embeds.device
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


def _graph(unet: Any) -> Graph:
    unet = with_packed_products(unet)
    description = describe_unet(unet)

    def graph(
        sample: Tensor,
        text: Tensor,
        time: Tensor,
        embeds: Tensor,
        keys: dict[str, tuple[Tensor, Tensor]],
        maps: Maps,
        banks: Banks,
    ) -> Tensor:
        def at_site(site: str, value: Tensor) -> Tensor:
            for codes in maps.get(site, ()):
                value = from_positions(restore(to_positions(value), codes, banks.get(site)), value)
            return value

        model = Model(unet, description, Texts(embeds, None, None), keys, None, False)
        forward = unet_forward(model, sample, text, time)
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
