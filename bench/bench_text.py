"""Every (layer, kind, token) of CLIP ViT-L/14's text encoder, restored in one packed pass, beside plain hooks.

    python -m bench.bench_text      (parts: float32 bfloat16, both by default; float16 on a GPU; quick: one round)

Random weights of the true shape, 77 tokens, noise on tokens 5 and 6: 1,848 runs. The floor is the plan's own count of
operations at the machine's GEMM rate, which is taken just before and just after on the model's own products, by the
quicker library at its best. Hooks, one forward a patch or 64 patches a forward, are timed on a random sample and
scaled; their results are compared with the packed ones first. Times are medians of interleaved rounds; peak memory is
beside the weights, for a rival that of one forward.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import fasttrace as ft
from fasttrace.engine.hooks import hooks
from fasttrace.engine.text import packed as packed_text
from fasttrace.engine.text.on_ops import linear_calls
from fasttrace.engine.text.trace import text_request
from fasttrace.engine.values import first

from . import record
from .timing import beside, first_calls, interleaved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, INNER, LAYERS, LENGTH, BATCH = 768, 3072, 12, 77, 64
SAMPLE, BATCHES, ROUNDS = 24, 2, 3


def encoder_of(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=12
    )
    return CLIPTextModel(config).eval().requires_grad_(False).to(DEVICE, dtype)


def gemm_rates(dtype: torch.dtype, rows: int = 4096) -> float:
    """FLOP/s over one layer's six products on many rows, each by the quicker library at its best of some rounds."""
    seconds = 0.0
    for inputs, outputs in [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER), (INNER, WIDTH)]:
        x = torch.randn(rows, inputs).to(DEVICE, dtype)
        module = torch.nn.Linear(inputs, outputs).to(DEVICE, dtype)
        for_long_passes = linear_calls(x, rows)
        contenders = {
            "own": lambda x=x, module=module: module(x),
            "reordered": lambda x=x, module=module, call=for_long_passes: call(module, x),
        }
        seconds += min(min(timing.seconds) for timing in interleaved(contenders, ROUNDS).values())
    return 2.0 * rows * (4 * WIDTH**2 + 2 * WIDTH * INNER) / seconds


def hooked(encoder: Any, ids: Tensor, noise: Tensor, clean: dict[str, Tensor], patches: list[ft.Patch]) -> Tensor:
    """One corrupted forward with a row for each patch, each patch by a hook."""
    modules = {site.name: site.module for site in ft.discover_sites(encoder)}

    def corrupt(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + noise

    def restore(row: int, patch: ft.Patch) -> Callable[..., None]:
        positions = list(patch.positions or ())

        def hook(module: Any, args: Any, output: Any) -> None:
            first(output)[row, positions] = clean[patch.site][positions]

        return hook

    restoring = [(modules[patch.site], restore(row, patch)) for row, patch in enumerate(patches)]
    with hooks([(encoder.get_input_embeddings(), corrupt), *restoring]):
        return encoder(input_ids=ids.expand(len(patches), -1)).last_hidden_state


def clean_values(encoder: Any, ids: Tensor) -> dict[str, Tensor]:
    """Every site's value ``[T, D]`` in the clean run."""
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: values.__setitem__(name, first(output)[0].clone())

    with hooks([(site.module, keep(site.name)) for site in ft.discover_sites(encoder)]):
        encoder(input_ids=ids[None])
    return values


@torch.no_grad()
def measure(dtype: torch.dtype, packed_fp32: float | None, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of results: the packed pass, then one for each rival; and the packed pass's seconds."""
    encoder = encoder_of(dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 49000, (LENGTH,), generator=generator).to(DEVICE)
    noise = torch.zeros(LENGTH, WIDTH, dtype=dtype, device=DEVICE)
    noise[5:7] = 0.1 * torch.randn(2, WIDTH, generator=generator).to(noise)
    sites = [site for site in ft.discover_sites(encoder) if site.kind != "hidden"]
    patches = [ft.Patch(site, [token]) for site in sites for token in range(LENGTH)]

    def compiled() -> Any:
        packed_text.forget_plans()
        return packed_text.plan_of(text_request(encoder, ids, patches, noise))

    compile_s = interleaved({"plan": compiled}, ROUNDS)["plan"].median
    plan = compiled()
    needed = plan.flops(WIDTH, INNER)
    clean, chosen = clean_values(encoder, ids), random.Random(0)
    sample = chosen.sample(range(len(patches)), SAMPLE)
    batch = [chosen.sample(range(len(patches)), BATCH) for _ in range(BATCHES)]

    def packed() -> Tensor:
        return ft.trace_text(encoder, ids, patches, noise).restored

    def one_by_one() -> list[Tensor]:
        return [hooked(encoder, ids, noise, clean, [patches[i]])[0] for i in sample]

    def batched() -> list[Tensor]:
        return [hooked(encoder, ids, noise, clean, [patches[i] for i in rows]) for rows in batch]

    runs: dict[str, Callable[[], Any]] = {"packed": packed, "hooks": one_by_one, "batched": batched}
    results, peaks = first_calls(runs)
    restored = results.pop("packed")
    timed = {"hooks": sample, "batched": [index for indices in batch for index in indices]}
    errors = {}
    for name, expected in (("hooks", torch.stack(results["hooks"])), ("batched", torch.cat(results["batched"]))):
        difference = (restored[timed[name]] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        errors[name] = float(difference.max())
    worst = 1e-5 if dtype == torch.float32 else 0.05
    assert max(errors.values()) < worst, f"the contenders disagree: {errors}"
    del restored, results, expected
    before = gemm_rates(dtype)
    times = interleaved(runs, rounds, peaks=peaks)
    after = gemm_rates(dtype)
    packed_s = times["packed"].median
    rate = needed / packed_s
    case = {"dtype": str(dtype).removeprefix("torch."), "patches": len(patches)}
    own = {
        **case,
        "plan_tflop": round(needed / 1e12, 3),
        "floor_s": round(needed / ((before + after) / 2), 1),
        "packed_s": round(packed_s, 1),
        "peak_mib": times["packed"].peak_mib,
        "gemm_gflops_before": round(before / 1e9, 1),
        "gemm_gflops_after": round(after / 1e9, 1),
        "packed_gflops": round(rate / 1e9, 1),
        "percent_of_gemm": round(100 * rate / ((before + after) / 2), 1),
        "times_own_fp32": "" if packed_fp32 is None else round(packed_fp32 / packed_s, 2),
        "compile_s": round(compile_s, 2),
        "compile_percent": round(100 * compile_s / packed_s, 2),
    }
    names = {"hooks": "hooks, one forward a patch", "batched": f"hooks, {BATCH} patches a forward"}
    rivals = [
        beside(
            {
                "what": f"text sweep, CLIP-L shape, {case['dtype']}",
                **case,
                "rival": names[name],
                "timed": f"{len(timed[name])} patches",
            },
            times["packed"],
            times[name],
            len(patches) / len(timed[name]),
        )
        | {"relative_difference": f"{errors[name]:.1e}"}
        for name in names
    ]
    return [own, *rivals], packed_s


def main(arguments: list[str]) -> None:
    fp32: float | None = None
    names = [name for name in arguments if name != "quick"]
    for name in names or (["float32", "bfloat16"] if DEVICE.type == "cpu" else ["float16"]):
        rows, seconds = measure(getattr(torch, name), fp32, 1 if "quick" in arguments else ROUNDS)
        fp32 = seconds if name == "float32" else fp32
        record.append("text", rows)
        for row in rows:
            print("\n".join(f"{key:28} {value}" for key, value in row.items()), end="\n\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
