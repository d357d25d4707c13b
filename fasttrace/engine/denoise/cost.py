"""What one row of a UNet costs, in operations up to each site and in bytes: from shapes alone, without a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class UNetCost:
    """Cost of one row.

    Attributes:
        flops: of the whole forward; a multiply and an add are two. Keys and values of the text are not counted, since
            they are computed once for all steps.
        flops_to: by site, of what is computed by the time the site's value is there.
        widest: numbers that are alive at once where memory is highest, skip connections included.
    """

    flops: float
    flops_to: dict[str, float]
    widest: int

    def suffix(self, site: str) -> float:
        """Share of a forward that remains for a row that joins at a site."""
        return 1 - self.flops_to[site] / self.flops


class _Counter:
    def __init__(self, tokens: int) -> None:
        self.flops, self.flops_to = 0.0, dict[str, float]()
        self.skips: list[int] = []
        self.widest, self._tokens = 0, tokens

    def weights(self, module: nn.Module, pixels: int) -> None:
        """Every linear and convolution layer inside a module, applied at ``pixels`` positions."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self.flops += 2 * layer.weight.numel() * pixels

    def alive(self, numbers: int) -> None:
        self.widest = max(self.widest, numbers + sum(self.skips))

    def site(self, name: str) -> None:
        self.flops_to[f"unet.{name}"] = self.flops

    def skip(self, numbers: int) -> None:
        self.skips.append(numbers)

    def resnet(self, name: str, module: Any, pixels: int) -> None:
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        for layer in convolutions:
            self.weights(layer, pixels)
        # Input, its normalised copy and activation, and the first convolution's output.
        self.alive(pixels * (3 * module.conv1.weight.shape[1] + module.conv1.weight.shape[0]))
        self.site(name)

    def attention(self, path: str, module: Any, pixels: int) -> None:
        self.weights(module.proj_in, pixels)
        for index, block in enumerate(module.transformer_blocks):
            inner = f"{path}.transformer_blocks.{index}"
            width = block.norm1.weight.shape[0]
            for name, one, crosses in (
                ("attn1", block.attn1, block.only_cross_attention),
                ("attn2", block.attn2, not block.double_self_attention),
            ):
                if one is None:
                    continue
                for projection in (one.to_q, one.to_out, *(() if crosses else (one.to_k, one.to_v))):
                    self.weights(projection, pixels)
                length = self._tokens if crosses else pixels
                self.flops += 4 * pixels * length * width
                self.alive(pixels * 6 * width)
                self.site(f"{inner}.{name}")
            self.weights(block.ff, pixels)
            # Two residuals, the input and its normalised copy; value and gate, the gate's activation, their product.
            self.alive(pixels * (4 * width + 4 * block.ff.net[2].weight.shape[1]))
            self.site(f"{inner}.ff")
            self.site(inner)
        self.weights(module.proj_out, pixels)
        self.site(path)


def unet_cost(unet: Any, size: Size, tokens: int) -> UNetCost:
    """Cost of one row.

    Args:
        unet: a ``UNet2DConditionModel``, on any device, ``meta`` included.
        size: height and width of the latents.
        tokens: length of the text.
    """
    counter = _Counter(tokens)
    levels = [size]
    for _ in unet.config.block_out_channels[1:]:
        levels.append((-(-levels[-1][0] // 2), -(-levels[-1][1] // 2)))
    pixels = [height * width for height, width in levels]
    counter.weights(unet.conv_in, pixels[0])
    counter.skip(unet.conv_in.weight.shape[0] * pixels[0])
    for level, block in enumerate(unet.down_blocks):
        for index in range(len(block.resnets)):
            width = _pair(counter, f"down_blocks.{level}", block, index, pixels[level])
            counter.skip(width * pixels[level])
        for sampler in block.downsamplers or ():
            counter.weights(sampler.conv, pixels[level + 1])
            counter.skip(width * pixels[level + 1])
    mid = unet.mid_block
    for index in range(len(mid.resnets) if mid is not None else 0):
        if index:
            counter.attention(f"mid_block.attentions.{index - 1}", mid.attentions[index - 1], pixels[-1])
        counter.resnet(f"mid_block.resnets.{index}", mid.resnets[index], pixels[-1])
    for place, block in enumerate(unet.up_blocks):
        level = len(levels) - 1 - place
        for index in range(len(block.resnets)):
            counter.skips.pop()
            _pair(counter, f"up_blocks.{place}", block, index, pixels[level])
        for sampler in block.upsamplers or ():
            counter.weights(sampler.conv, pixels[level - 1])
    counter.weights(unet.conv_out, pixels[0])
    return UNetCost(counter.flops, counter.flops_to, counter.widest)


def _pair(counter: _Counter, path: str, block: Any, index: int, pixels: int) -> int:
    """A resnet and the attention block after it, if there is one; returns their width."""
    counter.resnet(f"{path}.resnets.{index}", block.resnets[index], pixels)
    attentions = getattr(block, "attentions", None)
    if attentions is not None:
        counter.attention(f"{path}.attentions.{index}", attentions[index], pixels)
    return int(block.resnets[index].conv2.weight.shape[0])
