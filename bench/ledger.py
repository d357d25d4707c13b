"""What a forward launches, moves and waits for, counted without a GPU: ``python -m bench.ledger``.

A model on the meta device, 16 rows in fp16, runs under a mode that sees every operator with its shapes. The rules:

- A view is no operator, nor is an allocation. Attention is one, and so is each op of ``fasttrace.ops``.
- An operator's bytes are each tensor that it reads and each that it writes, once; a broadcast one by what is in memory.
- A convolution with a bias is charged a second pass over its result, which cuDNN leaves to an elementwise kernel.
- ``other`` is everything but convolutions, products and attention; that second pass belongs to it.
- The floor of an operator is the longer of its arithmetic at 990 TFLOP/s and its bytes at 3.35 TB/s, an H100's; that
  of a forward is their sum.

`count` takes any forward, so another path is one more entry of `PATHS`: a function of a `Model` that returns a call.
Such a function makes the inputs, and leaves only a step's own work to the call.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

import fasttrace as ft
from fasttrace.engine.denoise.execute import execute
from fasttrace.engine.denoise.patching import CallSites
from fasttrace.engine.denoise.plan import plan_calls
from fasttrace.engine.denoise.runs import Row
from fasttrace.models.unet import text_keys, time_states
from fasttrace.models.unet_ops import describe_unet_on_ops
from fasttrace.models.unit import Dims, Forward
from fasttrace.ops._register import Op
from fasttrace.patch import Patch

from .record import RESULTS

FLOPS, BYTES = 990e12, 3.35e12
ROWS, TOKENS = 16, 77
COLUMNS = (
    *("model", "path", "rows", "operators", "synchronising", "host_copies"),
    *("other_gb_row", "gflop_row", "floor_ms_row"),
)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "linear_restore", "geglu", "quick_gelu", "gelu_up"}
CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution"}
ATTENTION = {"attention_restore", "ragged_prefix_attention"}
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclasses.dataclass
class Count:
    """Sums over a forward of ``rows`` rows."""

    rows: int
    operators: int = 0
    synchronising: int = 0
    host_copies: int = 0
    bytes: float = 0.0
    other_bytes: float = 0.0
    flops: float = 0.0
    floor_seconds: float = 0.0

    def add(self, kind: str, traffic: float, flops: float = 0.0, operators: int = 1) -> None:
        self.operators += operators
        self.bytes += traffic
        self.other_bytes += traffic if kind == "other" else 0.0
        self.flops += flops
        self.floor_seconds += max(flops / FLOPS, traffic / BYTES)

    def row(self) -> dict[str, Any]:
        """The columns that are numbers."""
        return {
            "rows": self.rows,
            "operators": self.operators,
            "synchronising": self.synchronising,
            "host_copies": self.host_copies,
            "other_gb_row": round(self.other_bytes / self.rows / 1e9, 3),
            "gflop_row": round(self.flops / self.rows / 1e9, 1),
            "floor_ms_row": round(1e3 * self.floor_seconds / self.rows, 3),
        }


def count(forward: Callable[[], object], rows: int, epilogues: bool = False) -> Count:
    """Run a forward whose tensors are on the meta device, and count it.

    Args:
        forward: one step's work, its inputs made beforehand.
        rows: rows of its batch.
        epilogues: count an op of ``fasttrace.ops`` that is a product as a library's product and one pass after it.
    """
    seen = Count(rows)
    with torch.no_grad(), _Attention(seen), _Operators(seen, epilogues):
        forward()
    return seen


class _Attention(TorchFunctionMode):
    """Attention as one operator: on the meta device torch would take it apart."""

    def __init__(self, seen: Count) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)  # as a GPU's kernels leave it
        traffic = sum(size_of(tensor) for tensor in (query, key, value, out))
        self.seen.add("attention", traffic, sdpa_flop_count(query.shape, key.shape, value.shape))
        return out


class _Operators(TorchDispatchMode):
    """Every other operator, by what it is called."""

    def __init__(self, seen: Count, epilogues: bool) -> None:
        super().__init__()
        self.seen, self.epilogues = seen, epilogues

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = func._schema.name.split("::")[1]
        inputs, outputs = distinct((args, given)), distinct(result, written(func, args, given))
        if name in SYNCHRONISING:
            self.seen.synchronising += 1
        if len({tensor.device.type for tensor in [*inputs, *outputs] if tensor.ndim or tensor.is_meta}) > 1:
            self.seen.host_copies += 1
        if name in NO_WORK or is_view(func):
            return result
        traffic = float(sum(map(size_of, [*inputs, *outputs])))
        if name in CONVOLUTIONS:
            if args[0].is_contiguous(memory_format=torch.channels_last):
                result = result.contiguous(memory_format=torch.channels_last)  # as a GPU's kernels leave it
            self.seen.add("convolution", traffic, flops_of(func, args, given, result))
            if args[2] is not None:
                self.seen.add("other", 2.0 * size_of(result), operators=0)
        elif name in ATTENTION:
            self.seen.add("attention", traffic, attention_flops(args, given))
        elif name in PRODUCTS:
            self._product(func, name, traffic, args, given, result)
        else:
            self.seen.add("other", traffic)
        return result

    def _product(self, func: Any, name: str, traffic: float, args: Any, given: Any, result: Tensor) -> None:
        if func.namespace != "fasttrace":
            self.seen.add("product", traffic, flops_of(func, args, given, result))
            return
        x, weight = args[:2]
        value = x.shape[:-1].numel() * weight.shape[0] * x.element_size()
        flops = 2.0 * x.numel() * weight.shape[0]
        if not self.epilogues:
            self.seen.add("product", traffic, flops)
            return
        product = size_of(x) + size_of(weight) + value
        self.seen.add("product", product, flops)
        self.seen.add("other", traffic - size_of(x) - size_of(weight) + value)


def size_of(tensor: Tensor) -> float:
    """Bytes of the elements that a tensor has in memory; what it repeats counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return float(elements * tensor.element_size())


def distinct(*trees: Any) -> list[Tensor]:
    """The tensors in some arguments or results, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)}.values())


def written(func: Any, args: Any, given: Mapping[str, Any]) -> list[Any]:
    """Arguments that an operator writes to."""
    named = zip(func._schema.arguments, args, strict=False)
    pairs = [*named, *((one, given[one.name]) for one in func._schema.arguments if one.name in given)]
    return [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]


def is_view(func: Any) -> bool:
    """Whether an operator's results are windows on its arguments."""
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def flops_of(func: Any, args: Any, given: Mapping[str, Any], result: Any) -> float:
    return float(flop_registry[func._overloadpacket](*args, **given, out_val=result))


def attention_flops(args: Any, given: Mapping[str, Any]) -> float:
    """Two products over ``q [B, M, H, d]`` or ``[N, H, d]`` and all keys of a row, masked or not."""
    query, keys = args[0], args[1] if args[0].ndim == 4 else args[3]
    return 4.0 * query.numel() * keys.shape[1]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on the meta device: a pipeline's UNet or its first text encoder."""

    name: str
    pipeline: str
    text: bool = False

    def build(self) -> Any:
        pipe = ft.zoo.random_pipeline(self.pipeline, device="meta")
        return (pipe.text_encoder if self.text else pipe.unet).to(torch.float16)


MODELS = (Model("SD1.x", "sd15"), Model("SDXL", "sdxl"), Model("CLIP-L", "sd15", text=True))


def by_diffusers(model: Model) -> Callable[[], object]:
    """The model's own eager forward."""
    module = model.build()
    if model.text:
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
        return lambda: module(ids)
    config, half = module.config, {"device": "meta", "dtype": torch.float16}
    sample = torch.empty(ROWS, 4, config.sample_size, config.sample_size, **half)
    text = torch.empty(ROWS, TOKENS, config.cross_attention_dim, **half)
    time = torch.empty(ROWS, dtype=torch.long, device="meta")
    added = added_conditions(config)
    return lambda: module(sample, time, text, added_cond_kwargs=added)


def on_ops(model: Model) -> Callable[[], object] | None:
    """The engine's forward on ops: a clean and a corrupted row, and fourteen that are restored at a site each."""
    if model.text:
        return None
    unet = model.build().to(memory_format=torch.channels_last)
    described, config, half = describe_unet_on_ops(unet), unet.config, {"device": "meta", "dtype": torch.float16}
    dims = Dims(config.sample_size, config.sample_size, TOKENS)
    clean, corrupted = (Row((0, run, 0), run, None, ()) for run in (0, 1))
    sites = [name for name, site in described.sites.items() if site.listed]
    restored = [
        Row((0, 2 + number, 0), 1, None, ((Patch(sites[number * len(sites) // (ROWS - 2)]), clean.key),))
        for number in range(ROWS - 2)
    ]
    device = torch.device("meta")
    (plan,) = plan_calls(
        [clean, corrupted, *restored], ROWS, described, lambda name: described.positions(name, dims), device
    )
    sample = torch.empty(ROWS, 4, dims.height, dims.width, **half).contiguous(memory_format=torch.channels_last)
    embeds, timestep = torch.empty(2, TOKENS, config.cross_attention_dim, **half), torch.empty(1, device="meta")
    shared = {"keys": text_keys(described, embeds), "embeds": embeds}
    added = added_conditions(config)
    called = CallSites(plan.sites, {}, False)

    def forward() -> object:
        time = time_states(unet, timestep, None, embeds, added)
        constants = Forward(dims, shared, {"time": time, "text": plan.text}, ROWS, called.inside)
        return execute(described, constants, {"sample": sample}, called.at_end, plan.joins, {})

    forward()  # what is made once: joined weights
    return forward


def added_conditions(config: Any) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes, of every row."""
    if config.addition_embed_type is None:
        return None
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    half = {"device": "meta", "dtype": torch.float16}
    return {"text_embeds": torch.empty(ROWS, width, **half), "time_ids": torch.empty(ROWS, 6, **half)}


@contextlib.contextmanager
def ops_kept_whole() -> Iterator[None]:
    """Ops by their registered names, whose results on the meta device come of shapes alone."""
    call = Op.__call__
    Op.__call__ = lambda self, *args, **given: getattr(torch.ops.fasttrace, self.name)(*args, **given)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Op.__call__ = call  # type: ignore[method-assign]


PATHS: dict[str, tuple[Callable[[Model], Callable[[], object] | None], bool]] = {
    "diffusers": (by_diffusers, False),
    "fused": (on_ops, False),
    "epilogue": (on_ops, True),
}
"""Paths by name: what makes a model's forward, and whether products have their epilogues as passes of their own."""


def rows(models: tuple[Model, ...] = MODELS) -> Iterator[dict[str, Any]]:
    """A row a model and path."""
    for model in models:
        for path, (make, epilogues) in PATHS.items():
            with ops_kept_whole():
                forward = make(model)
                if forward is not None:
                    yield {"model": model.name, "path": path, **count(forward, ROWS, epilogues).row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "ledger.csv", help="default: %(default)s")
    path: Path = parser.parse_args().out
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows():
            writer.writerow(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
