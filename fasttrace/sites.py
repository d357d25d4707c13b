"""Sites: the modules of a pipeline whose output can be patched, found by class and listed in execution order."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import ModelError, SiteError
from .models.text.families import canonical_path, text_layers
from .models.text.families import is_causal as is_causal
from .models.text.units import layer_units
from .models.unet import describe_unet

KINDS = ("resnet", "self_attn", "cross_attn", "mlp", "hidden", "head")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*TEXT_PARTS, "unet")


@dataclass(frozen=True)
class Site:
    """One patchable module.

    Attributes:
        name: dotted path in the pipeline without ``text_model.``; the same in every version of transformers.
        part: ``"text_encoder"``, ``"text_encoder_2"``, ``"unet"``, or ``"model"`` for a language model by itself.
        kind: ``"resnet"``, ``"self_attn"``, ``"cross_attn"``, ``"mlp"``, ``"hidden"`` or ``"head"``.
        layer: text encoders: the layer's number; UNet: the position among the sites of its kind, in execution order.
        module: the module itself. The site's value is what a forward hook on it sees, first element if a tuple.
        channels: of a head only, whose ``module`` is the attention's output projection: the head's share of that
            module's *input* is the site's value.
    """

    name: str
    part: str
    kind: str
    layer: int
    module: nn.Module = field(repr=False, compare=False)
    channels: slice | None = field(default=None, repr=False, compare=False)


def discover_sites(pipe: Any) -> list[Site]:
    """All sites of a pipeline: text encoders first, then the UNet, each in the order in which the forward runs.

    Text encoders give ``self_attn``, ``mlp`` and ``hidden`` for each layer; a UNet gives ``resnet``, ``self_attn``,
    ``cross_attn`` and ``mlp`` (70 for SD1.x and SD2.x, 227 for SDXL). Whole transformer blocks and attention blocks of
    the UNet and single heads of text encoders are not listed, but `find_site` takes them by name. A language model may
    stand in for the pipeline: its sites are named by their paths in it (``model.layers.0.self_attn``,
    ``transformer.h.0.attn``).

    Raises:
        ModelError: nothing in the pipeline is of a class that is known.
    """
    sites = [site for part, module in _parts(pipe) for site in part_sites(module, part)]
    if not sites:
        raise ModelError(
            f"no sites in {type(pipe).__name__}: expected a CLIP text encoder or a UNet2DConditionModel among {PARTS}"
        )
    return sites


def _parts(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    for part in ("model",) if isinstance(pipe, nn.Module) else PARTS:
        module = pipe if part == "model" else getattr(pipe, part, None)
        if isinstance(module, nn.Module):
            yield part, module


def part_sites(module: nn.Module, part: str) -> list[Site]:
    """The sites of one text encoder or UNet, in execution order."""
    if part == "unet":
        return list(_unet_sites(module))
    return [site for site in _text_sites(module, part) if site.kind != "head"]


def head_sites(encoder: nn.Module, part: str) -> list[Site]:
    """Every head of a text encoder or language model: what it contributes to the attention's output projection.

    Named after the attention (``text_encoder.encoder.layers.0.self_attn.heads.3``); values ``[T, d]``.
    """
    return [site for site in _text_sites(encoder, part) if site.kind == "head"]


def find_site(pipe: Any, name: str) -> Site:
    """The site called ``name``: any of `discover_sites`, a head (`head_sites`), or a whole transformer or attention
    block of the UNet, which has kind ``hidden``.

    Raises:
        SiteError: no such site; the message has the nearest names.
    """
    return find_sites(pipe, [name])[name]


def find_sites(pipe: Any, names: Iterable[str]) -> dict[str, Site]:
    """Several sites by name, as `find_site`, from one look at the pipeline's modules."""
    wanted = list(dict.fromkeys(names))
    known = {site.name: site for site in discover_sites(pipe)}
    if not known.keys() >= set(wanted):
        known |= {block.name: block for block in unet_blocks(pipe)}
        texts = (head_sites(module, part) for part, module in _parts(pipe) if part != "unet")
        known |= {head.name: head for heads in texts for head in heads}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SiteError(unknown_site(unknown[0], list(known)))
    return {name: known[name] for name in wanted}


def select_sites(sites: Sequence[Site], patterns: str | Iterable[str]) -> list[Site]:
    """The sites that match any pattern, in their own order.

    Args:
        sites: where to choose from.
        patterns: ``"unet"``, ``"text"``, ``"all"``, a name, or a glob such as ``"unet.up_blocks.*.attn1"``; or several.

    Raises:
        SiteError: a pattern matches nothing.
    """
    wanted: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {site.name for site in sites if _matches(site, pattern)}
        if not found:
            raise SiteError(unknown_site(pattern, [site.name for site in sites]))
        wanted |= found
    return [site for site in sites if site.name in wanted]


def _matches(site: Site, pattern: str) -> bool:
    if pattern in ("unet", "text", "all"):
        return pattern == "all" or (site.part == "unet") == (pattern == "unet")
    return fnmatch.fnmatchcase(site.name, pattern)


def unknown_site(name: str, names: Sequence[str]) -> str:
    """What an error says of a name or pattern that matches none of ``names``, with the nearest of them."""
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"no site matches {name!r} among {len(names)} sites{hint}"


def _text_sites(encoder: nn.Module, part: str) -> Iterator[Site]:
    """Every site of the layers in a text encoder, heads included, in the order in which the forward runs."""
    for layer in text_layers(encoder):
        path = layer.path if part == "model" else f"{part}.{canonical_path(layer.path)}"
        for point in (point for unit in layer_units(layer, path) for point in unit.sites):
            yield Site(point.path, part, point.kind, layer.number, point.module, point.channels)


def _unet_sites(unet: nn.Module) -> Iterator[Site]:
    return (site for site in _described(unet) if site.kind != "hidden")


def unet_blocks(pipe: Any) -> Iterator[Site]:
    """Whole transformer and attention blocks of the pipeline's UNet, which are sites by name only."""
    unet = getattr(pipe, "unet", None)
    return (site for site in _described(unet) if site.kind == "hidden") if isinstance(unet, nn.Module) else iter(())


def _described(unet: nn.Module) -> Iterator[Site]:
    """Every site of a UNet's description, numbered among those of its kind."""
    count = dict.fromkeys(KINDS, 0)
    for name, point in describe_unet(unet).sites.items():
        yield Site(name, "unet", point.kind, count[point.kind], point.module, point.channels)
        count[point.kind] += 1
