"""Every (layer, kind, token) of CLIP ViT-L/14's text encoder, restored in one packed pass, beside plain hooks.

    python -m bench.bench_text      (parts: float32 bfloat16, both by default; float16 on a GPU)

Random weights of the true shape, 77 tokens, noise on tokens 5 and 6: 1,848 runs. The floor is the plan's own count of
operations at the machine's GEMM rate, which is taken just before and just after on the model's own products, by the
quicker library at its best. Hooks, one forward a patch or 64 patches a forward, are timed on a random sample and
scaled; their results are compared with the packed ones first. Times are medians of interleaved rounds.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import fasttrace as ft
from fasttrace.engine import packed_text
from fasttrace.engine.linear import linear_calls
from fasttrace.engine.text import text_request

from . import record
from .timing import interleaved

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
    handles = [
        encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: output + noise),
    ]
    for row, patch in enumerate(patches):

        def overwrite(module: Any, args: Any, output: Any, row: int = row, patch: ft.Patch = patch) -> None:
            value = output[0] if isinstance(output, tuple) else output
            value[row, list(patch.positions or ())] = clean[patch.site][list(patch.positions or ())]

        handles.append(modules[patch.site].register_forward_hook(overwrite))
    try:
        return encoder(input_ids=ids.expand(len(patches), -1)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


def clean_values(encoder: Any, ids: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    handles = []
    for site in ft.discover_sites(encoder):

        def keep(module: Any, args: Any, output: Any, name: str = site.name) -> None:
            values[name] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        handles.append(site.module.register_forward_hook(keep))
    encoder(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return values


@torch.no_grad()
def measure(dtype: torch.dtype, packed_fp32: float | None) -> tuple[dict[str, Any], float]:
    """One row of results, and the packed pass's seconds."""
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

    restored = packed()
    errors = [float((restored[i] - one).norm() / one.norm()) for i, one in zip(sample, one_by_one(), strict=True)]
    del restored
    before = gemm_rates(dtype)
    times = interleaved({"packed": packed, "hooks": one_by_one, "batched": batched}, ROUNDS, warmup=0)
    after = gemm_rates(dtype)
    packed_s = times["packed"].median
    single, in_batches = len(patches) / SAMPLE, len(patches) / (BATCH * BATCHES)
    over_single = [single * ratio for ratio in times["packed"].ratio_to(times["hooks"])]
    over_batched = [in_batches * ratio for ratio in times["packed"].ratio_to(times["batched"])]
    rate = needed / packed_s
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "patches": len(patches),
        "plan_tflop": round(needed / 1e12, 3),
        "floor_s": round(needed / ((before + after) / 2), 1),
        "packed_s": round(packed_s, 1),
        "gemm_gflops_before": round(before / 1e9, 1),
        "gemm_gflops_after": round(after / 1e9, 1),
        "packed_gflops": round(rate / 1e9, 1),
        "percent_of_gemm": round(100 * rate / ((before + after) / 2), 1),
        "hooks_s": round(single * times["hooks"].median, 1),
        "hooks_sampled": SAMPLE,
        "hooks_batch64_s": round(in_batches * times["batched"].median, 1),
        "batch64_sampled": BATCH * BATCHES,
        "times_hooks": round(over_single[1], 2),
        "times_hooks_low": round(over_single[0], 2),
        "times_hooks_high": round(over_single[2], 2),
        "times_hooks_batch64": round(over_batched[1], 2),
        "times_hooks_batch64_low": round(over_batched[0], 2),
        "times_hooks_batch64_high": round(over_batched[2], 2),
        "times_own_fp32": "" if packed_fp32 is None else round(packed_fp32 / packed_s, 2),
        "compile_s": round(compile_s, 2),
        "compile_percent": round(100 * compile_s / packed_s, 2),
        "worst_relative_difference": f"{max(errors):.1e}",
    }
    return row, packed_s


def main(names: list[str]) -> None:
    fp32: float | None = None
    for name in names or (["float32", "bfloat16"] if DEVICE.type == "cpu" else ["float16"]):
        row, seconds = measure(getattr(torch, name), fp32)
        fp32 = seconds if name == "float32" else fp32
        record.append("text", [row])
        print("\n".join(f"{key:28} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
