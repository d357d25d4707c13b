"""Sites: the modules of a pipeline whose output can be patched, found by class and listed in execution order."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .errors import ModelError, SiteError
from .models.description import Description
from .models.heads import with_heads
from .models.registry import description_of
from .models.text.description import Layer
from .models.text.families import canonical_path, text_layers
from .models.text.families import is_causal as is_causal
from .models.text.units import layer_units

KINDS = ("resnet", "self_attn", "cross_attn", "joint_attn", "mlp", "hidden", "modulation", "head")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISER_PARTS = ("unet", "transformer")
PARTS = (*TEXT_PARTS, *DENOISER_PARTS)


@dataclass(frozen=True)
class Site:
    """One patchable module.

    Attributes:
        name: dotted path in the pipeline without ``text_model.``; the same in every version of transformers.
        part: one of `PARTS`, or ``"model"`` for a language model by itself.
        kind: one of `KINDS`.
        layer: text encoders: the layer's number; denoisers: the position among the sites of its kind, in execution
            order; a head's is its attention's.
        module: the module itself. The site's value is what a forward hook on it sees, or an element of that.
        channels: of a head only, whose ``module`` is the attention's output projection: the head's share of that
            module's *input* is the site's value.
        output: which element, where the module's output is a tuple.
        stream: ``"image"`` or ``"text"`` where the module gives both, else ``""``.
    """

    name: str
    part: str
    kind: str
    layer: int
    module: nn.Module = field(repr=False, compare=False)
    channels: slice | None = field(default=None, repr=False, compare=False)
    output: int = field(default=0, repr=False)
    stream: str = field(default="", repr=False)


def discover_sites(pipe: Any) -> list[Site]:
    """All sites of a pipeline: text encoders first, then the denoiser, each in the order in which the forward runs.

    Text encoders give ``self_attn``, ``mlp`` and ``hidden`` for each layer; a UNet gives ``resnet``, ``self_attn``,
    ``cross_attn`` and ``mlp`` (70 for SD1.x and SD2.x, 227 for SDXL); a transformer ``joint_attn``, ``self_attn``,
    ``cross_attn`` and ``mlp``, a site for each stream (SD3-medium 94, SD3.5-medium 107, SD3.5-large 150, FLUX.1 152,
    PixArt-sigma 84). Whole blocks of a denoiser, modulations and single heads are not listed, but `find_site` takes
    them by name. A language model may stand in for the pipeline: its sites are named by their paths in it
    (``model.layers.0.self_attn``, ``transformer.h.0.attn``).

    Raises:
        ModelError: nothing in the pipeline is of a class that is known.
    """
    sites = [site for part, module in _parts(pipe) for site in part_sites(module, part)]
    if not sites:
        raise ModelError(
            f"no sites in {type(pipe).__name__}: expected a CLIP text encoder, a UNet2DConditionModel or a known "
            f"transformer among {PARTS}"
        )
    return sites


def _parts(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    for part in ("model",) if isinstance(pipe, nn.Module) else PARTS:
        module = pipe if part == "model" else getattr(pipe, part, None)
        if isinstance(module, nn.Module):
            yield part, module


def part_sites(module: nn.Module, part: str) -> list[Site]:
    """The sites of one text encoder or denoiser, in execution order."""
    if part in DENOISER_PARTS:
        return list(_denoiser_sites(module, listed=True))
    return [site for site in text_sites(text_layers(module), part) if site.kind != "head"]


def head_sites(encoder: nn.Module, part: str) -> list[Site]:
    """Every head of a text encoder or language model: what it contributes to the attention's output projection.

    Named after the attention (``text_encoder.encoder.layers.0.self_attn.heads.3``); values ``[T, d]``.
    """
    return [site for site in text_sites(text_layers(encoder), part) if site.kind == "head"]


def find_site(pipe: Any, name: str) -> Site:
    """The site called ``name``: any of `discover_sites`, a head (`head_sites`; ``<attention>.heads.3``), a modulation
    (``<norm>.modulation``), or a whole block of the denoiser, which has kind ``hidden``.

    Raises:
        SiteError: no such site; the message has the nearest names.
    """
    return find_sites(pipe, [name])[name]


def find_sites(pipe: Any, names: Iterable[str]) -> dict[str, Site]:
    """Several sites by name, as `find_site`, from one look at the pipeline's modules."""
    wanted = list(dict.fromkeys(names))
    known = {site.name: site for site in discover_sites(pipe)}
    if not known.keys() >= set(wanted):
        for part, module in _parts(pipe):
            denoises = part in DENOISER_PARTS
            others = _denoiser_sites(module, False, wanted) if denoises else head_sites(module, part)
            known |= {site.name: site for site in others}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SiteError(unknown_site(unknown[0], list(known)))
    return {name: known[name] for name in wanted}


def select_sites(sites: Sequence[Site], patterns: str | Iterable[str]) -> list[Site]:
    """The sites that match any pattern, in their own order.

    Args:
        sites: where to choose from.
        patterns: ``"text"``, ``"unet"``, ``"transformer"``, ``"denoiser"`` for either, ``"all"``, a name, or a glob
            such as ``"unet.up_blocks.*.attn1"``; or several.

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
    if pattern in DENOISER_PARTS:
        return site.part == pattern
    if pattern in ("text", "denoiser", "all"):
        return pattern == "all" or (site.part in DENOISER_PARTS) == (pattern == "denoiser")
    return fnmatch.fnmatchcase(site.name, pattern)


def unknown_site(name: str, names: Sequence[str]) -> str:
    """What an error says of a name or pattern that matches none of ``names``, with the nearest of them."""
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"no site matches {name!r} among {len(names)} sites{hint}"


def text_sites(layers: Iterable[Layer], part: str) -> Iterator[Site]:
    """Every site of a text model's layers, heads included, in the order in which the forward runs."""
    for layer in layers:
        path = layer.path if part == "model" else f"{part}.{canonical_path(layer.path)}"
        for unit in layer_units(layer, path):
            for point in unit.sites:
                yield Site(point.path, part, point.kind, layer.number, point.module, point.channels)


def unet_blocks(pipe: Any) -> Iterator[Site]:
    """Whole transformer and attention blocks of the pipeline's UNet, which are sites by name only."""
    unet = getattr(pipe, "unet", None)
    return _denoiser_sites(unet, listed=False) if isinstance(unet, nn.Module) else iter(())


def _denoiser_sites(model: nn.Module, listed: bool, heads: Iterable[str] = ()) -> Iterator[Site]:
    """Sites of a denoiser's description that discovery lists, or the others, some heads among them."""
    description = description_of(model)
    if description is None:
        return
    described = with_heads(description, heads)
    layers = _layers(description)
    for name, point in described.sites.items():
        if point.listed == listed:
            layer = layers[name.rpartition(".heads.")[0] if point.kind == "head" else name]
            yield Site(
                name, described.part, point.kind, layer, point.module, point.channels, point.output, point.stream
            )


def _layers(description: Description) -> dict[str, int]:
    """Every site's number among those of its kind."""
    count = dict.fromkeys(KINDS, 0)
    layers = {}
    for name, point in description.sites.items():
        layers[name] = count[point.kind]
        count[point.kind] += 1
    return layers
