"""Single heads of attentions as sites: what a head contributes to the output projection.

They are many, so a description has none of its own; one that has some is made for the names that are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from .description import Description
from .unit import Dims, Heads, SitePoint

_HEAD = re.compile(r"(?P<attention>.+)\.heads\.(?P<number>\d+)")


def with_heads(description: Description, names: Iterable[str]) -> Description:
    """The same units with some heads as sites, ``<attention>.heads.3``, values ``[P, d]``; other names are ignored."""
    units = list(description.units)
    found = {name: head_of(description, name) for name in names}
    if all(attention is None for attention, _ in found.values()):
        return description
    for attention, number in found.values():
        if attention is None or attention.heads is None:
            continue
        place = description.place[f"{description.part}.{attention.path}"]
        while attention.heads.value not in units[place].writes:
            place -= 1
        point = _point(attention, attention.heads, number)
        units[place] = replace(units[place], sites=(*units[place].sites, point))
    return replace(description, units=units)


def head_of(description: Description, name: str) -> tuple[SitePoint | None, int]:
    """The attention that a head belongs to and the head's number; ``None`` where the name is no head's."""
    match = _HEAD.fullmatch(name)
    attention = None if match is None else description.sites.get(match["attention"])
    if match is None or attention is None or attention.heads is None:
        return None, -1
    number = int(match["number"])
    return (attention, number) if number < attention.heads.count else (None, -1)


def _point(attention: SitePoint, heads: Heads, number: int) -> SitePoint:
    def shape(dims: Dims) -> tuple[int, int]:
        return attention.shape(dims)[0], heads.width

    return SitePoint(
        f"{attention.path}.heads.{number}",
        "head",
        heads.value,
        shape,
        heads.module,
        stream=attention.stream,
        listed=False,
        channels=slice(number * heads.width, (number + 1) * heads.width),
    )
