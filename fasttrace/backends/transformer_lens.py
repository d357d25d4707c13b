"""TransformerLens' `generic_activation_patch`, with its signature, a packed pass instead of one forward a cell.

Its ready-made sweeps (``get_act_patch_resid_pre``, ``get_act_patch_attn_head_out_by_pos``, ...) have the same names
here. The stock patch setters are recognised by identity, and the activations below by name. Anything else still works:
it runs in TransformerLens itself, at its own speed, after a warning that says so.

==============  ===============================  ==========================================================
activation      patch setters                    becomes
==============  ===============================  ==========================================================
``resid_pre``   ``layer_pos``                    the layer before's hidden state; noise on the embedding at 0
``resid_post``  ``layer_pos``                    the layer's hidden state
``attn_out``    ``layer_pos``                    the attention's output
``mlp_out``     ``layer_pos``                    the MLP's output
``z``           ``layer_pos``, ``layer_head``,   its heads, before the output projection
                ``layer_pos_head``
==============  ===============================  ==========================================================
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..engine.text.linear import on_packed
from ..errors import BackendError
from ..models.text.families import text_model
from ..patch import Patch, PatchSet
from ..sites import Site
from .base import Backend, Sweep, tokens_read
from .plain import plain

Metric = Callable[[Tensor], Any]

_KINDS = {"resid_pre": "hidden", "resid_post": "hidden", "attn_out": "self_attn", "mlp_out": "mlp", "z": "head"}


@dataclass(frozen=True)
class Cells:
    """Cells of one sweep over one corrupted prompt.

    Attributes:
        tokens: the corrupted prompt, ``[T]``.
        runs: patches of each cell.
        noise: ``[S, T, D]`` where the embedding is patched: a noise sample takes the place of a run.
        position: the only token whose state is read, or ``None``.
    """

    tokens: Tensor
    runs: Sequence[PatchSet]
    noise: Tensor | None
    position: int | None


class TransformerLensBackend(Backend[Cells]):
    """Final states of patched runs; `generic_activation_patch` turns them into what the metric says.

    Args:
        bridge: a ``TransformerBridge`` without weight processing.
        batch_size: cells that are held at once, as in `Backend`.

    Raises:
        BackendError: a model that is no bridge, or whose weights TransformerLens has processed.
    """

    def __init__(self, bridge: Any, batch_size: int | None = None) -> None:
        original = getattr(bridge, "original_model", None)
        if original is None:
            raise BackendError(f"{type(bridge).__name__} is no TransformerBridge: load one with boot_transformers")
        if getattr(bridge, "compatibility_mode", False):
            raise BackendError("the bridge is in compatibility mode, which changes its weights: boot one without it")
        super().__init__(plain(original), batch_size)

    def sweep(self, request: Cells) -> Sweep:
        base = "clean" if request.noise is None else "corrupted"
        return Sweep(request.tokens, request.runs, request.noise, base, position=request.position)

    def score(self, request: Cells, states: Tensor) -> Tensor:
        return states.transpose(0, 1).flatten(0, 1)

    @cached_property
    def _sites_of(self) -> dict[tuple[str, int], list[Site]]:
        """The sites of each kind and layer: one, or the heads."""
        sites = defaultdict(list)
        for site in self.sites:
            sites[site.kind, site.layer].append(site)
        return sites

    def cells(
        self,
        tokens: Tensor,
        clean: Mapping[str, Tensor],
        name: str,
        indices: Sequence[Sequence[int]],
        setter: str,
        position: int | None,
    ) -> list[tuple[list[int], Cells]]:
        """The cells of a sweep as requests, each with the cells' numbers.

        Args:
            tokens: one corrupted prompt ``[T]``.
            clean: its row of the clean cache, by hook name.
            name: the activation.
            indices: ``[layer, pos]``, ``[layer, pos, head]`` or ``[layer, head]`` of each cell.
            setter: which of these, by the setter's name without ``_patch_setter``.
            position: the only token whose state is read, or ``None``.
        """
        from transformer_lens.utilities import get_act_name

        runs: list[PatchSet] = []
        embedded: list[int] = []
        ours: list[int] = []
        for cell, index in enumerate(indices):
            layer = int(index[0])
            value = clean[get_act_name(name, layer=layer)]
            if name == "resid_pre" and layer == 0:
                embedded.append(cell)
                continue
            ours.append(cell)
            sites = self._sites_of[_KINDS[name], layer - (name == "resid_pre")]
            runs.append(_head_patches(sites, value, index, setter) if name == "z" else _at(sites[0], value, index[1]))
        requests = [(ours, Cells(tokens, runs, None, position))] if runs else []
        if embedded:
            noise = self._embedding_noise(tokens, clean[get_act_name(name, layer=0)], [indices[c][1] for c in embedded])
            requests.append((embedded, Cells(tokens, [()], noise, position)))
        return requests

    def logits_of(
        self,
        tokens: Tensor,
        clean_cache: Any,
        name: str,
        indices: Sequence[Sequence[int]],
        setter: str,
        positions: Sequence[int] | None,
    ) -> Iterator[Tensor]:
        """Logits of each cell, ``[batch, T, vocabulary]``, NaN at tokens that are not among ``positions``.

        The arguments are those of `cells`, for the whole batch: ``tokens`` ``[batch, T]`` and its cache.

        Raises:
            BackendError: a position that the prompts do not have, or a cache of another number of prompts.
        """
        from transformer_lens.utilities import get_act_name

        rows, length = tokens.shape
        read = tokens_read(positions, length)
        only = read[0] if read is not None and len(read) == 1 else None
        size = self.runs_at_once(length, rows * (length if only is None else 1))
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            shape = (length,) if only is None else ()
            full = len(chunk), rows, *shape, self.embedding_width
            states = torch.empty(full, dtype=self.model.dtype, device=tokens.device)
            names = {get_act_name(name, layer=int(index[0])) for index in chunk}
            for row, prompt in enumerate(tokens):
                clean = {key: _row(clean_cache, key, row, rows) for key in names}
                for numbers, request in self.cells(prompt, clean, name, chunk, setter, only):
                    states[numbers, row] = self.run(request)
            if read is not None:
                states = states[:, :, read] if only is None else states[:, :, None]
            for logits in self.logits_of_each(states):
                yield logits if read is None else _at_tokens(logits, read, length)

    def _embedding_noise(self, tokens: Tensor, value: Tensor, positions: Sequence[int]) -> Tensor:
        model = text_model(self.model)
        embedded = model.embed(on_packed, tokens, model.constants(len(tokens)))
        noise = embedded.new_zeros(len(positions), *embedded.shape)
        for sample, position in enumerate(positions):
            noise[sample, position] = value[position].to(embedded) - embedded[position]
        return noise


def _row(cache: Any, name: str, row: int, rows: int) -> Tensor:
    """One prompt's activation ``[T, ...]``; a cache of one prompt serves all, as in TransformerLens."""
    values: Tensor = cache[name]
    if len(values) not in (1, rows):
        raise BackendError(f"{name} in the clean cache is of {len(values)} prompts: expected 1, or {rows} as corrupted")
    return values[row if len(values) > 1 else 0]


def _at_tokens(logits: Tensor, tokens: list[int], length: int) -> Tensor:
    """Logits ``[batch, n, vocabulary]`` of some tokens at their places in ``[batch, T, vocabulary]``, NaN elsewhere."""
    everywhere = logits.new_full((len(logits), length, logits.shape[-1]), float("nan"))
    everywhere[:, tokens] = logits
    return everywhere


def _at(site: Site, value: Tensor, position: int) -> Patch:
    """The clean value ``[T, D]`` at one position."""
    return Patch(site, [int(position)], source=value[int(position)])


def _head_patches(heads: Sequence[Site], value: Tensor, index: Sequence[int], setter: str) -> PatchSet:
    """The clean values ``[T, H, d]`` of one head or all of them, at one position or all."""
    if setter == "layer_pos":
        return tuple(_at(head, value[:, number], index[1]) for number, head in enumerate(heads))
    number = int(index[-1])
    if setter == "layer_head":
        return Patch(heads[number], source=value[:, number])
    return _at(heads[number], value[:, number], index[1])


@torch.no_grad()
def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    patching_metric: Metric | Mapping[str, Metric],
    patch_setter: Callable[..., Tensor],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
    batch_size: int | None = None,
    logit_positions: Sequence[int] | None = None,
) -> Any:
    """`transformer_lens.patching.generic_activation_patch` in packed passes; see there for what is not said here.

    Args:
        model: a ``TransformerBridge``.
        corrupted_tokens: ``[batch, T]``.
        batch_size: cells that are held at once; by default as many as fit in a fixed budget of memory.
        logit_positions: the only tokens whose logits the metric reads, such as ``[-1]``: the others are NaN, and their
            head is not computed, which is most of the cost where the vocabulary is large.

    Returns:
        What TransformerLens returns: a tensor, a tensor with the index, or a ``PatchingResult``.

    Raises:
        BackendError: a model that is no bridge, or one in compatibility mode; a position that the prompts do not have;
            a clean cache of several prompts, but not as many.
    """
    from transformer_lens import patching

    setters = {
        getattr(patching, f"{name}_patch_setter"): name
        for name in ("layer_pos", "layer_head_vector", "layer_pos_head_vector")
    }
    setter = setters.get(patch_setter, "").removesuffix("_vector")
    served = activation_name in _KINDS and setter and (setter == "layer_pos" or activation_name == "z")
    if not served:
        warnings.warn(
            f"{getattr(patch_setter, '__name__', patch_setter)} on {activation_name!r} is not one that fasttrace "
            "batches: running in TransformerLens, one forward a cell",
            stacklevel=2,
        )
        return patching.generic_activation_patch(
            model, corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name,
            index_axis_names, index_df, return_index_df, reduce=reduce, baseline=baseline,
        )  # fmt: skip

    indices = _indices(model, corrupted_tokens, index_axis_names, index_df)
    backend = TransformerLensBackend(model, batch_size)
    logits = backend.logits_of(corrupted_tokens, clean_cache, activation_name, indices, setter, logit_positions)
    return patching.generic_activation_patch(
        _Replay(model, logits), corrupted_tokens, clean_cache, patching_metric, patch_setter, activation_name,
        index_axis_names, index_df, return_index_df, reduce=reduce, baseline=baseline,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    """TransformerLens' ready-made sweeps, partial calls of its `generic_activation_patch`, over the one here."""
    if name.startswith("get_act_patch_"):
        from transformer_lens import patching

        own = getattr(patching, name, None)
        if isinstance(own, functools.partial) and own.func is patching.generic_activation_patch:
            return functools.partial(generic_activation_patch, *own.args, **own.keywords)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Replay:
    """A model whose patched runs are done already: TransformerLens asks for them one by one and does the rest."""

    def __init__(self, model: Any, logits: Iterator[Tensor]) -> None:
        self._model = model
        self._logits = logits
        self.training = model.training

    @property
    def cfg(self) -> Any:
        return self._model.cfg

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Sequence[Any]) -> Tensor:
        logits: Tensor = next(self._logits) if fwd_hooks else self._model.run_with_hooks(tokens, fwd_hooks=[])
        return logits

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.run_with_cache(*args, **kwargs)

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.to_tokens(*args, **kwargs)


def _indices(model: Any, tokens: Tensor, names: Sequence[str] | None, table: Any) -> list[list[int]]:
    """Index of each cell in TransformerLens' order: the rows of a table, or all combinations, the last axis fastest."""
    if table is not None:
        rows: list[list[int]] = table.to_numpy().tolist()
        return rows
    heads, length = model.cfg.n_heads, tokens.shape[-1]
    sizes = {"layer": model.cfg.n_layers, "pos": length, "head_index": heads, "head": heads}
    return [list(index) for index in itertools.product(*(range(sizes[name]) for name in names or ()))]
