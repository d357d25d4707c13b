"""A text sweep down to pictures and scores: a study beside ``pipe([prompt] * 2)`` for each cell, as EMCID does it.

    python -m bench.bench_pictures

The packaged model; every attention and MLP of its text encoder, restored at the subject's last token and at the end of
text. The rival draws a spread of the cells; its scores are compared with the study's first, and its time is scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fasttrace as ft
from fasttrace.metrics.metrics import RunBatch

from . import record
from .rivals import picture_of_text_cell
from .timing import beside, first_calls, interleaved

TEXT, SUBJECT, STEPS, ROUNDS, EVERY = "a red apple in flat style", "apple", 20, 3, 6


@torch.no_grad()
def main() -> None:
    pipe = ft.load_pipeline("emoji", device="cpu")
    study = ft.Study(
        pipe,
        prompts=[ft.Prompt(TEXT, subject=SUBJECT, attribute="object")],
        sites=["text_encoder.*.self_attn", "text_encoder.*.mlp"],
        positions=["subject_last", "eos"],
        num_inference_steps=STEPS,
    )
    (tokens,) = study.tokens["text_encoder"].values()
    assert study.sigma is not None
    width = pipe.text_encoder.config.hidden_size
    noise = study.corruption.draw(study.sigma["text_encoder"], 0, len(tokens.ids), tokens.subject, width)
    modules = {site.name: site for site in ft.discover_sites(pipe)}
    table = ft.run(study, progress=False, pictures=0).to_pandas()
    cells = table[["site", "position"]].iloc[::EVERY]
    (metric,) = study.resolved_metrics

    def ours() -> Tensor:
        return torch.tensor(ft.run(study, progress=False, pictures=0).to_pandas()["restored"].to_numpy())

    def theirs() -> Tensor:
        pictures = [
            picture_of_text_cell(pipe, TEXT, noise, modules[site], [position], 0, num_inference_steps=STEPS)
            for site, position in cells.itertuples(index=False)
        ]
        return metric.score(RunBatch(prompts=[TEXT] * len(pictures), images=torch.stack(pictures)))

    runs = {"ours": ours, "theirs": theirs}
    results, peaks = first_calls(runs)
    error = float((results["ours"][::EVERY] - results["theirs"]).abs().max())
    assert error < 0.01, f"scores out of 100 differ by {error:.2g}"
    timing = interleaved(runs, ROUNDS, peaks=peaks)
    said = {
        "what": f"text sweep to pictures and CLIP scores, emoji, {STEPS} steps: {len(table)} cells",
        "rival": "EMCID's way: pipe([prompt] * 2) a cell, its two slips mended",
        "timed": f"{len(cells)} of {len(table)} cells",
    }
    row = beside(said, timing["ours"], timing["theirs"], len(table) / len(cells))
    row |= {"score_difference": f"{error:.1e}"}
    print(row, flush=True)
    record.append("pictures", [row])


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
