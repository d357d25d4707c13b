"""Each backend beside its library on the same sweep: a GPT-2-small shape, 32 tokens, every (layer, token).

    python -m bench.bench_backends [rome] [transformer_lens] [pyvene] [nnsight]

Random weights. Each library is used as its documentation recommends. A rival that takes minutes is timed on a spread of
the cells and scaled, and the row says so; the cells that it did run are compared with ours first. Peak memory is beside
the model's weights; a rival's is that of the cells that it ran. Ours run within the memory that backends state.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrace.backends import rome
from tests.backends.rome_reference import trace_one_cell

from . import record
from .timing import beside, first_calls, interleaved

TOKENS, LAYERS, SUBJECT, SAMPLES = 32, 12, (5, 8), 10
CELLS = [(layer, token) for layer in range(LAYERS) for token in range(TOKENS)]
SOME = CELLS[7::32]
INVOKES = 32  # in one trace of nnsight: 16 and 96 are slower by the cell

ONE_BY_ONE = "its own loop, one forward a cell"

Cells = Sequence[tuple[int, int]]
Rival = tuple[Callable[[Cells], Tensor], Cells]


def gpt2_small() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)


def prompt(seed: int) -> Tensor:
    return torch.randint(0, 50257, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def bench_rome(model: Any) -> list[dict[str, Any]]:
    """Ten noise samples, hidden states restored: 384 cells of eleven rows."""
    ids, answer = prompt(0), torch.tensor(11)
    states = {cell: [(cell[1], f"transformer.h.{cell[0]}")] for cell in CELLS}
    inp = {"input_ids": ids.repeat(SAMPLES + 1, 1)}

    def ours() -> Tensor:
        return rome.trace_many(model, inp, list(states.values()), answer, SUBJECT, 0.5)

    def theirs(cells: Cells) -> Tensor:
        return torch.stack(
            [trace_one_cell(model, ids, states[cell], answer, SUBJECT, samples=SAMPLES, noise=0.5) for cell in cells]
        )

    return compare("ROME trace_with_patch, hidden states, 10 noise samples", ours, {ONE_BY_ONE: (theirs, SOME)})


def bench_transformer_lens(model: Any) -> list[dict[str, Any]]:
    """``resid_post`` by layer and position, logit difference at the last token."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from fasttrace.backends import transformer_lens as backend
    from fasttrace.zoo.offline_tokenizer import offline_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        offline_tokenizer(1000).save_pretrained(folder)
        model.config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.config.architectures = ["GPT2LMHeadModel"]
        options = {"hf_model": model, "tokenizer": tokenizer, "dtype": torch.float32, "device": "cpu"}
        bridge = TransformerBridge.boot_transformers("gpt2-small", **options)
    clean, corrupted = prompt(0)[None], prompt(1)[None]
    _, cache = bridge.run_with_cache(clean)
    setter = patching.layer_pos_patch_setter

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 9]

    def table(cells: Sequence[tuple[int, int]]) -> Any:
        import pandas

        return pandas.DataFrame(cells, columns=["layer", "pos"])

    def ours(**options: Any) -> Tensor:
        return backend.generic_activation_patch(
            bridge, corrupted, cache, metric, setter, "resid_post", index_df=table(CELLS), **options
        )

    def theirs(cells: Cells) -> Tensor:
        with torch.no_grad():
            return patching.generic_activation_patch(
                bridge, corrupted, cache, metric, setter, "resid_post", index_df=table(cells)
            )

    what, rivals = "TransformerLens generic_activation_patch, resid_post", {ONE_BY_ONE: (theirs, SOME)}
    return [
        *compare(f"{what}, the call unchanged", ours, rivals),
        *compare(f"{what}, the metric said to read the last token", partial(ours, logit_positions=[-1]), rivals),
    ]


def bench_pyvene(model: Any) -> list[dict[str, Any]]:
    """Interchange of a block's output at one position; the rival builds one ``IntervenableModel`` a cell."""
    import pyvene

    from fasttrace.backends import pyvene as backend

    base, source = {"input_ids": prompt(1)[None]}, {"input_ids": prompt(0)[None]}

    def cell(layer: int, token: int) -> tuple[Any, dict[str, int]]:
        representation = pyvene.RepresentationConfig(
            layer, "block_output", intervention_type=pyvene.VanillaIntervention
        )
        return pyvene.IntervenableConfig([representation]), {"sources->base": token}

    def ours() -> Tensor:
        cells = [cell(*each) for each in CELLS]
        sweep = backend.intervene_many(model, cells, base, source, logit_positions=[-1])
        return torch.stack([logits[0, 0, 5] for logits in sweep])

    def theirs(cells: Cells) -> Tensor:
        found = []
        for layer, token in cells:
            config, locations = cell(layer, token)
            with torch.no_grad():
                _, output = pyvene.IntervenableModel(config, model)(base, [source], locations)
            found.append(output.logits[0, -1, 5])
        return torch.stack(found)

    return compare(
        "pyvene IntervenableModel, block_output, by intervene_many at the last token",
        ours,
        {ONE_BY_ONE: (theirs, SOME)},
    )


def bench_nnsight(model: Any) -> list[dict[str, Any]]:
    """Envoys as addresses; the rival runs a trace a cell, or the cells as invokes of one trace."""
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    import fasttrace as ft
    from fasttrace.backends import nnsight as backend
    from fasttrace.zoo.offline_tokenizer import offline_tokenizer

    wrapped = TransformersModel(model, tokenizer=offline_tokenizer(1000), task="text-generation")
    base, source = prompt(1), prompt(0)
    noise = torch.zeros(TOKENS, 768)

    def ours() -> Tensor:
        patches = [
            patch
            for layer, token in CELLS
            for patch in backend.patches(wrapped, [wrapped.transformer.h[layer]], positions=[token], source="other")
        ]
        trace = ft.trace_text(model, base, patches, noise, base="clean", sources={"other": source})
        return trace.restored[:, -1] @ model.lm_head.weight[5]

    def clean_states() -> Any:
        with wrapped.trace(source[None]):
            states = nnsight.save([block.output for block in wrapped.transformer.h])
        return states  # noqa: RET504 - the body of a trace may not return

    @torch.no_grad()
    def traces(cells: Cells) -> Tensor:
        clean, found = clean_states(), []
        for layer, token in cells:
            with wrapped.trace(base[None]):
                wrapped.transformer.h[layer].output[:, token] = clean[layer][:, token]
                logits = wrapped.lm_head.output.save()
            found.append(logits[0, -1, 5])
        return torch.stack(found)

    @torch.no_grad()
    def invokes(cells: Cells) -> Tensor:
        clean = clean_states()
        with wrapped.trace() as tracer:
            found = nnsight.save([])
            for layer, token in cells:
                with tracer.invoke(base[None]):
                    wrapped.transformer.h[layer].output[:, token] = clean[layer][:, token]
                    found.append(wrapped.lm_head.output[0, -1, 5])
        return torch.stack(list(found))

    rivals = {
        "one trace a cell": (traces, SOME),
        f"{INVOKES} invokes in one trace": (invokes, CELLS[5 :: len(CELLS) // INVOKES]),
    }
    return compare("nnsight, block output", ours, rivals)


def compare(what: str, ours: Callable[[], Tensor], rivals: dict[str, Rival], rounds: int = 3) -> list[dict[str, Any]]:
    """Check that all compute the same, then time them in turn; a rival's time is scaled to all cells."""
    runs = {"ours": ours} | {name: partial(theirs, cells) for name, (theirs, cells) in rivals.items()}
    results, peaks = first_calls(runs)
    errors = {}
    for name, (_, cells) in rivals.items():
        mine = results["ours"][[CELLS.index(cell) for cell in cells]]
        errors[name] = float((mine - results[name]).abs().max() / results[name].abs().max())
        assert errors[name] < 1e-5, f"{what}, {name}: the two disagree by {errors[name]:.1e}"
    timing = interleaved(runs, rounds, peaks=peaks)
    return [
        beside(
            {"what": what, "rival": name, "timed": f"{len(cells)} of {len(CELLS)} cells"},
            timing["ours"],
            timing[name],
            scale=len(CELLS) / len(cells),
        )
        | {"relative_difference": f"{errors[name]:.1e}"}
        for name, (_, cells) in rivals.items()
    ]


SUITES = {
    "rome": bench_rome,
    "transformer_lens": bench_transformer_lens,
    "pyvene": bench_pyvene,
    "nnsight": bench_nnsight,
}


def main(names: Sequence[str]) -> None:
    for name in names or SUITES:
        rows = SUITES[name](gpt2_small())
        for row in rows:
            print(f"{row['what']}: {row['median_s']} s; {row['rival']}: {row['rival_median_s']} s, {row['ratio']}x")
        record.append("backends", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
