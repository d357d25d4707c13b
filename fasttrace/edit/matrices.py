"""The weights that an edit can reach: linear projections of text encoders and of cross-attention, by name."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EditError, SiteError
from ..models.text.description import Layer
from ..models.text.families import text_layers
from ..sites import TEXT_PARTS, Site, discover_sites

# Of cross-attention.
_CROSS_PROJECTIONS = ("to_k", "to_v")
_DIGEST_ROWS = 64


@dataclass(frozen=True)
class Matrix:
    """One linear projection.

    Attributes:
        name: the site's name and the projection: ``text_encoder.encoder.layers.0.self_attn.out_proj``.
        site: the site that it belongs to.
        module: the projection; its weight is ``[N, K]``.
        default: whether naming the site alone means this projection.
        into_hidden: whether what it returns is added to the hidden state of a text encoder.
        before_attention: whether it makes queries, keys or values.
    """

    name: str
    site: Site
    module: nn.Module = field(repr=False, compare=False)
    default: bool = True
    into_hidden: bool = False
    before_attention: bool = True

    @property
    def part(self) -> str:
        return self.site.part

    @property
    def is_text(self) -> bool:
        return self.part in TEXT_PARTS

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)


def list_matrices(pipe: Any) -> list[Matrix]:
    """Every matrix of the pipeline that an edit can reach, in execution order."""
    parts = {part: getattr(pipe, part, None) for part in TEXT_PARTS}
    layers = {part: list(text_layers(encoder)) for part, encoder in parts.items() if isinstance(encoder, nn.Module)}
    found: list[Matrix] = []
    for site in discover_sites(pipe):
        found += _of_text(site, layers[site.part][site.layer]) if site.part in TEXT_PARTS else _of_unet(site)
    return [matrix for matrix in found if _is_editable(matrix.module)]


def select_matrices(pipe: Any, sites: str | Site | Iterable[str | Site]) -> list[Matrix]:
    """The matrices that names or globs mean.

    Args:
        sites: a site (its default projection: ``out_proj`` of attention, ``fc2`` of an MLP, ``to_k`` and ``to_v`` of
            cross-attention), a site's name with a projection (``...mlp.fc1``), or globs of either; one or several.

    Raises:
        SiteError: a name that matches nothing.
        EditError: no name, or a site without a weight that an edit can reach.
    """
    patterns = [sites] if isinstance(sites, str | Site) else list(sites)
    if not patterns:
        raise EditError("no sites to edit: expected at least one name or glob")
    matrices = list_matrices(pipe)
    wanted: set[str] = set()
    for pattern in patterns:
        name = pattern.name if isinstance(pattern, Site) else pattern
        found = [m.name for m in matrices if fnmatch.fnmatchcase(m.name, name)]
        found += [m.name for m in matrices if m.default and fnmatch.fnmatchcase(m.site.name, name)]
        if not found:
            raise _nothing_matches(pipe, name, matrices)
        wanted.update(found)
    return [matrix for matrix in matrices if matrix.name in wanted]


def _nothing_matches(pipe: Any, name: str, matrices: Sequence[Matrix]) -> Exception:
    has_site = any(fnmatch.fnmatchcase(site.name, name) for site in discover_sites(pipe))
    if has_site:
        return EditError(
            f"site {name!r} has no weight that an edit can reach: expected self_attn or mlp of a text encoder, or "
            "cross-attention of the UNet (attn2)"
        )
    known = list(dict.fromkeys([*(m.site.name for m in matrices), *(m.name for m in matrices)]))
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return SiteError(f"no site matches {name!r}" + (f"; nearest: {', '.join(nearest)}" if nearest else ""))


def _of_text(site: Site, layer: Layer) -> Iterator[Matrix]:
    """The projections of a layer that are within one of its sites; the one that writes to the hidden state first."""
    for weight in layer.weights:
        if weight.kind == site.kind:
            name, writes = f"{site.name}.{weight.name}", weight.into_hidden
            yield Matrix(name, site, weight.module, writes, writes, weight.before_attention)


def _of_unet(site: Site) -> Iterator[Matrix]:
    for name in _CROSS_PROJECTIONS if site.kind == "cross_attn" else ():
        module = getattr(site.module, name, None)
        if module is not None:
            yield Matrix(f"{site.name}.{name}", site, module)


def _is_editable(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # transformers' Conv1D keeps [K, N], and has no in_features.
    width = getattr(module, "in_features", None)
    return isinstance(weight, Tensor) and weight.shape[1:] == (width,) and weight.is_floating_point()


def tokenizer_of(pipe: Any, part: str) -> Any:
    """The tokenizer that feeds a text encoder: ``tokenizer_2`` for ``text_encoder_2``."""
    return getattr(pipe, part.replace("text_encoder", "tokenizer"))


def fingerprint(weight: Tensor) -> str:
    """Digest of a matrix by its shape and the signs of up to 64 rows.

    Signs survive a cast, so that an edit fitted in float32 is recognised on the same model in half precision; another
    model, or a fine-tuned one, differs in some of tens of thousands of signs.
    """
    rows = weight.detach()[:: max(1, weight.shape[0] // _DIGEST_ROWS)]
    signs = np.packbits(torch.signbit(rows).cpu().numpy())
    shape = ",".join(map(str, weight.shape)).encode()
    return hashlib.sha256(shape + b":" + signs.tobytes()).hexdigest()[:32]
