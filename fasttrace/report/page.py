"""The report's one page: plain HTML that needs no network and no script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ..findings.findings import Findings
from ..findings.wording import counted, number

ROWS_SHOWN = 15

_STYLE = """
:root { color-scheme: light; --ink: #1d2433; --muted: #667085; --line: #d7dce3; --ground: #f4f6f9; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; } p.muted, caption { color: var(--muted); }
img { max-width: 100%; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; display: block; }
div.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { background: var(--ground); } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--ground); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 12.5px; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""

_COLUMNS = {
    "aie": "average indirect effect: mean of restored - base over prompts (seeds and noise samples averaged first)",
    "low, high": "its 95% bootstrap interval over prompts; empty with one prompt",
    "to_clean": "mean of restored - clean: what is still missing",
    "total_effect": "mean of clean - corrupted",
    "share, normalized": "indirect effect over total effect",
    "rank_low, rank_high": "95% interval of the rank when prompts are resampled",
    "tied_with_first": "the paired difference from the first does not exclude zero",
}


def document(effects: Findings, sections: Sequence[str]) -> str:
    """The whole page."""
    table = effects.table
    model = effects.record.get("model") or {}
    named = Path(model.get("name") or model.get("class") or "").name  # of a folder its own name, not where it stood
    about = (
        f"{counted(table['prompt_id'].nunique(), 'prompt')}, {counted(table['site'].nunique(), 'site')}, "
        f"{counted(len(table), 'row')}{f', model {escape(str(named))}' if named else ''}"
    )
    columns = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in _COLUMNS.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Causal trace</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f'<body><h1>Causal trace</h1><p class="muted">{about}</p>\n'
        + "\n".join(sections)
        + f"\n<h2>What the columns mean</h2><dl>{columns}</dl></body></html>\n"
    )


def words(title: str, text: str) -> str:
    """A heading and paragraphs."""
    return f"<h2>{escape(title)}</h2>" + "".join(f"<p>{escape(line)}</p>" for line in text.splitlines())


def figures(title: str, names: Sequence[str]) -> str:
    """A heading and pictures beside the page."""
    return f"<h2>{escape(title)}</h2>" + "".join(f'<img src="{escape(name)}" alt="{escape(name)}">' for name in names)


def table(title: str, frame: pd.DataFrame, file: str) -> str:
    """The first rows of a table; the file has all of them."""
    shown = frame.head(ROWS_SHOWN)
    kinds = ["number" if pd.api.types.is_numeric_dtype(frame[name]) else "" for name in frame.columns]
    head = "".join(f"<th{_class(kind)}>{escape(str(n))}</th>" for n, kind in zip(frame.columns, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(kind)}>{_cell(v)}</td>" for v, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    more = f"{len(shown)} of {len(frame)} rows; all of them in" if len(frame) > len(shown) else "As a file:"
    link = f'<p class="muted">{more} <a href="{escape(file)}">{escape(file)}</a></p>'
    return f'<h3>{escape(title)}</h3><div class="scroll"><table><tr>{head}</tr>{body}</table></div>{link}'


def record(settings: dict[str, Any]) -> str:
    """Everything that is needed to repeat the study."""
    text = escape(json.dumps(settings, indent=2, ensure_ascii=False, default=str))
    return f"<h2>The record</h2><details open><summary>study.json</summary><pre>{text}</pre></details>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return escape(str(value))
