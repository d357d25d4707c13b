"""Which rows share a call: cut to size so that calls are full, and so that what rows copy from is at hand."""

from __future__ import annotations

from collections.abc import Sequence

from .runs import Key, Row

BUCKET = 4
"""Rows of a compiled call are a multiple of this: enough of them to need few graphs, few enough to waste little."""


def joining_site(row: Row, order: dict[str, int]) -> str:
    """The first site at which a row differs from its parent."""
    return min((patch.site for patch, _ in row.patches), key=order.__getitem__)


def pack(rows: Sequence[Row], budget: int, order: dict[str, int], lockstep: bool = False) -> list[list[list[Row]]]:
    """Cut rows into calls of at most ``budget`` rows, of nearly equal size: sections of calls that share values.

    Roots come first, then the rows that join, by the site where they do: so calls are full from their beginning to
    their end. Across the calls of a section, a row that joins enters with its parent's state, and a row that copies
    from another takes its recorded value: one row's values at the patched sites, kept until they are read, cost less
    than computing it again.

    Args:
        rows: a row that others copy from comes before them.
        budget: most rows of a call; with ``lockstep``, a row and those that it copies from may be more.
        order: of the sites, from `site_order`.
        lockstep: since a compiled graph neither lets rows join nor gives out values, rows that join are a section of
            their own, with the roots that they need, and the other roots' calls compute their sources again. Fewer
            roots than a compiled call has stay with the rows that join.
    """
    roots = [row for row in rows if row.parent is None]
    joiners = sorted((row for row in rows if row.parent is not None), key=lambda row: order[joining_site(row, order)])
    if not lockstep:
        return [_even(roots + joiners, budget)]
    needed = {key for row in joiners for key in (row.parent, *(source for _, source in row.patches))}
    answered = [row for row in roots if row.key in needed]
    others = [row for row in roots if row.key not in needed] if joiners else roots
    if joiners and len(others) < BUCKET:
        return [_even(roots + joiners, budget)]
    by_key = {row.key: row for row in roots}
    return [_even(answered + joiners, budget), *([call] for call in _self_contained(others, by_key, budget))]


def _even(rows: list[Row], budget: int) -> list[list[Row]]:
    calls = -(-len(rows) // budget)
    size = -(-len(rows) // max(1, calls))
    return [rows[start : start + size] for start in range(0, len(rows), size or 1)]


def _self_contained(rows: list[Row], by_key: dict[Key, Row], budget: int) -> list[list[Row]]:
    """Calls that hold what their rows copy from, with the fewest rows in the largest."""
    calls = _filled(rows, by_key, budget)
    for size in range(-(-len(rows) // max(1, len(calls))), budget):
        smaller = _filled(rows, by_key, size)
        if len(smaller) == len(calls):
            return smaller
    return calls


def _filled(rows: list[Row], by_key: dict[Key, Row], size: int) -> list[list[Row]]:
    calls: list[list[Row]] = []
    present: set[Key] = set()
    for row in rows:
        needs = {source for _, source in row.patches if source is not None}
        if not calls or len(present | needs | {row.key}) > max(size, 1 + len(needs)):
            calls.append([])
            present = set()
        calls[-1] += [by_key[key] for key in sorted(needs - present)]
        if row.key not in present:
            calls[-1].append(row)
        present |= {row.key, *needs}
    return calls
