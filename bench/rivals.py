"""The loops that people write on a diffusers pipeline, as plainly and as well as they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrace.engine.hooks import hooks
from fasttrace.engine.values import first
from fasttrace.sites import Site


def hooked_batch(pipe: Any, texts: Sequence[Tensor], latents: Tensor, sites: Sequence[Site], **options: Any) -> Tensor:
    """One call of the pipeline on a clean row, a corrupted row and a row for each site, with one hook a site.

    A site's hook copies the clean row to the row that restores it, in the conditional half of the batch.

    Args:
        texts: states of the clean, the corrupted and the negative prompt, ``[T, D]`` each.
        latents: ``[C, h, w]``, where every row starts.
        sites: of the UNet; one site makes the published batch of clean, corrupted and restored.
        options: of the pipeline's call.

    Returns:
        Final latents ``[2 + sites, C, h, w]``.
    """
    clean, corrupted, negative = texts
    rows = 2 + len(sites)

    def restore(row: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = first(output)
            value[rows + row] = value[rows]

        return hook

    with hooks([(site.module, restore(2 + index)) for index, site in enumerate(sites)]):
        output: Tensor = pipe(
            prompt_embeds=torch.stack([clean, *[corrupted] * (rows - 1)]),
            negative_prompt_embeds=negative.expand(rows, -1, -1),
            latents=latents.expand(rows, -1, -1, -1),
            output_type="latent",
            **options,
        ).images
    return output


def picture_of_text_cell(
    pipe: Any, prompt: str, noise: Tensor, site: Site, tokens: Sequence[int], seed: int, **options: Any
) -> Tensor:
    """One cell of a text sweep as EMCID makes it: ``pipe([prompt] * 2)``, whose second row is corrupted and restored.

    Two slips of that way are mended, so that it computes what fasttrace does: the second row starts from the first
    row's latents, and the negative prompt, which the same encoder reads, is left alone.

    Args:
        noise: ``[T, D]``, added to the word embeddings.
        site: of the text encoder, restored at ``tokens``.
        options: of the pipeline's call.

    Returns:
        The restored picture ``[3, H, W]`` in [0, 1].
    """
    seen: set[Any] = set()

    def once(module: Any) -> bool:
        """Whether this is the module's first call: the prompt's; the negative prompt's comes after it."""
        new = module not in seen
        seen.add(module)
        return new

    def corrupt(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return torch.stack([output[0], output[1] + noise]) if once(module) else None

    def restore(module: Any, args: Any, output: Any) -> None:
        value = first(output)
        if once(module):
            value[1, list(tokens)] = value[0, list(tokens)]

    with hooks([(pipe.text_encoder.get_input_embeddings(), corrupt), (site.module, restore)]):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        pictures: Tensor = pipe([prompt] * 2, generator=generators, output_type="pt", **options).images
    return pictures[1]
