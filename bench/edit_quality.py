"""How well edits work on the packaged model, as found: every method, and Diff-QuickFix at every text site.

    python -m bench.edit_quality [--cases 4] [--seeds 2] [--only METHOD ...]

Each edit is judged on the same prompts and seeds (`fasttrace.edit.cases.emoji_cases`). ``gone`` is the share of
pictures of target prompts and paraphrases from which the judge finds the old value gone, ``became`` that finds the
new one there, and ``unrelated_changed`` the share of unrelated pictures of which it reads any of the six attributes
differently; each with a 95% Wilson interval. Beside each text site stands its average indirect effect on the same
words' pictures, so that a reader sees whether "trace, then edit there" holds on this model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import fasttrace as ft
from fasttrace.edit import Edit, fit_edit
from fasttrace.edit.cases import emoji_attribute, emoji_captions, emoji_cases
from fasttrace.edit.judge import AttributeReader, judge
from fasttrace.zoo import emoji
from fasttrace.zoo.emoji.data import ATTRIBUTES
from fasttrace.zoo.emoji.evaluate import wilson

from . import record

CONCEPTS = (("striped style", "flat style"), ("penguin", "owl"))
SENTENCES = ("{}", "a photo of {}", "a picture of {}")
GUIDANCE = 3.0


def candidates(pipe: Any, old: str, new: str) -> Iterator[tuple[str, Edit]]:
    """Edits by name: every text site, and every method with its own settings and with aligned tokens."""
    concept = {old: new}
    others = [v for v in ATTRIBUTES[emoji_attribute(old, new)] if v not in (old, new)]
    layers = pipe.text_encoder.config.num_hidden_layers
    for layer in range(layers):
        for kind in ("self_attn", "mlp"):
            site = f"text_encoder.encoder.layers.{layer}.{kind}"
            yield (
                f"quickfix {site.removeprefix('text_encoder.encoder.')}",
                fit_edit(pipe, concept, SENTENCES, site=site),
            )
    yield "quickfix release", fit_edit(pipe, concept, mode="release")
    yield "memit", fit_edit(pipe, concept, SENTENCES, method="memit")
    for method in ("time", "uce", "locoedit", "rece"):
        yield method, fit_edit(pipe, concept, SENTENCES, method=method, preserve=others)
    vocabulary = [value for values in ATTRIBUTES.values() for value in values if value != old]
    for method in ("quickfix", "uce"):
        yield f"{method}, all words preserved", fit_edit(pipe, concept, SENTENCES, method=method, preserve=vocabulary)
        yield (
            f"{method}, captions preserved",
            fit_edit(pipe, concept, SENTENCES, method=method, captions=emoji_captions()),
        )


def traced_effects(pipe: Any, old: str) -> dict[str, float]:
    """Average indirect effect of each text site at the last token of the old words, in points of CLIP score."""
    texts = (
        [f"a {old}", f"a photo of a {old}"] if "style" not in old else [f"a mushroom in {old}", f"a penguin in {old}"]
    )
    study = ft.Study(
        pipe,
        prompts=[ft.Prompt(text, subject=old) for text in texts],
        sites=["text_encoder.*.self_attn", "text_encoder.*.mlp"],
        positions="subject_last",
        guidance_scale=GUIDANCE,
        metrics=["clip_score"],
    )
    table = ft.run(study, progress=False).to_pandas()
    return {str(site): float(effect) for site, effect in table.groupby("site")["indirect_effect"].mean().items()}


def share(values: Any) -> tuple[float, str]:
    """A share, and its 95% interval."""
    right, total = int(values.astype(float).sum()), len(values)
    low, high = wilson(right, total)
    return round(right / total, 3), f"{low:.2f} to {high:.2f}"


def rows_of(pipe: Any, old: str, new: str, number: int, seeds: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """One row an edit of one concept."""
    attribute = emoji_attribute(old, new)
    reader = AttributeReader(emoji.load_judge().read, attribute, old, new)
    cases, effects = emoji_cases(old, new, number), traced_effects(pipe, old)
    before = None
    for method, edit in candidates(pipe, old, new):
        if only and method not in only:
            continue
        found = judge(pipe, edit, cases, reader, seeds=range(seeds), before=before, guidance_scale=GUIDANCE)
        before = found.before
        target = found.table[found.table["about"].isin(("target", "paraphrase"))]
        unrelated = found.table[found.table["about"] == "unrelated"]
        row: dict[str, Any] = {"edit": f"{old} -> {new}", "method": method, "pictures": len(found.table)}
        for name, values in (
            ("gone_before", target["gone_before"]),
            ("gone", target["gone_after"]),
            ("became", target["became"]),
            ("unrelated_changed", unrelated["changed"]),
        ):
            row[name], row[f"{name}_interval"] = share(values)
        site = f"text_encoder.encoder.{method.removeprefix('quickfix ')}"
        row["traced_effect"] = round(effects[site], 2) if site in effects else None
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4, help="scenes of each kind")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help='names of the "method" column')
    options = parser.parse_args()
    pipe = ft.load_pipeline("emoji")
    for old, new in CONCEPTS:
        for row in rows_of(pipe, old, new, options.cases, options.seeds, options.only):
            print({name: value for name, value in row.items() if "interval" not in name}, flush=True)
            record.append("edit_quality", [row])


if __name__ == "__main__":
    main()
