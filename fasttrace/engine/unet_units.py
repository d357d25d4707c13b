"""A UNet as one flat list of units with a place for rows to join, be overwritten or recorded at every site.

The units call the shadow's own modules, so hooks and adapters on them act. Between the modules stands what diffusers'
blocks do around them (residuals, skip connections, attention), written once more here; `flat_units` returns ``None``
for a UNet with anything else in it, which then runs by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Unit = Callable[["Stream"], None]
AtSite = Callable[[str, Tensor], tuple[Tensor, Tensor | None]]
"""Called with a site and its value; returns the value of all rows that are there afterwards, and the parents of those
that joined."""

_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}


@dataclass
class Stream:
    """What flows through the units in one call.

    Attributes:
        x: ``[B, C, h, w]``, or ``[B, P, D]`` within an attention block; rows that join are appended.
        time: ``[B, E]`` time embedding of all rows of the call, or ``[1, E]`` where they share it.
        text: ``[B]`` condition of all rows of the call.
        keys: cross-attention keys and values of every condition, by site: ``[K, H, T, d]``.
        embeds: ``[K, T, D]``, for attention that runs as a module.
        parents: ``[B]`` root that each row joins; its own index for a root.
        at_site: what happens at sites.
        resize: whether feature maps are not halves of each other, so that upsampling must be told the size.
        skips: outputs of the way down.
        residual: what entered the attention block.
    """

    x: Tensor
    time: Tensor
    text: Tensor
    keys: dict[str, tuple[Tensor, Tensor]]
    embeds: Tensor
    parents: Tensor
    at_site: AtSite
    resize: bool
    skips: list[Tensor] = field(default_factory=list)
    residual: Tensor | None = None

    def grown(self, earlier: Tensor) -> Tensor:
        """A tensor from before some rows joined, for all rows that are there now."""
        now, then = self.x.shape[0], earlier.shape[0]
        return earlier if now == then else torch.cat([earlier, earlier[self.parents[then:now]]])

    def time_now(self) -> Tensor:
        return self.time if self.time.shape[0] == 1 else self.time[: self.x.shape[0]]

    def replace(self, site: str, value: Tensor) -> None:
        """``x`` becomes a site's value."""
        self.x, _ = self.at_site(site, value)

    def add(self, site: str, value: Tensor) -> None:
        """A site's value is added to ``x``."""
        value, joined = self.at_site(site, value)
        self.x = (self.x if joined is None else torch.cat([self.x, self.x[joined]])) + value


def flat_units(unet: Any) -> list[Unit] | None:
    """The units of a shadow in execution order, or ``None`` where it has parts that they do not cover."""
    return list(_units(unet)) if _is_covered(unet) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_covered(unet: Any) -> bool:
    config = unet.config
    if (
        torch.nn.modules.module._global_forward_hooks
        or torch.nn.modules.module._global_forward_pre_hooks
        or config.center_input_sample
        or unet.class_embedding is not None
        or config.addition_embed_type not in (None, "text_time")
        or unet.encoder_hid_proj is not None
    ):
        return False
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    bypassed = [unet, *blocks]
    for block in blocks:
        if type(block).__name__ not in _BLOCKS or any(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
            return False
        for attention in getattr(block, "attentions", None) or ():
            transformers = list(getattr(attention, "transformer_blocks", ()))
            bypassed += [attention, *transformers]
            if type(attention).__name__ != "Transformer2DModel" or not attention.is_input_continuous:
                return False
            for inner in transformers:
                plain = inner.norm_type == "layer_norm" and inner.pos_embed is None and inner._chunk_size is None
                if type(inner).__name__ != "BasicTransformerBlock" or not plain:
                    return False
    return not any(has_hooks(module) for module in bypassed)


def _units(unet: Any) -> Iterator[Unit]:
    yield _push
    for index, block in enumerate(unet.down_blocks):
        yield from _down(f"unet.down_blocks.{index}", block)
    if unet.mid_block is not None:
        path, mid = "unet.mid_block", unet.mid_block
        yield _resnet(f"{path}.resnets.0", mid.resnets[0])
        for index, attention in enumerate(mid.attentions):
            if attention is not None:
                yield from _attention(f"{path}.attentions.{index}", attention)
            yield _resnet(f"{path}.resnets.{index + 1}", mid.resnets[index + 1])
    last = len(unet.up_blocks) - 1
    for index, block in enumerate(unet.up_blocks):
        yield from _up(f"unet.up_blocks.{index}", block, index == last)


def _down(path: str, block: Any) -> Iterator[Unit]:
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        yield _resnet(f"{path}.resnets.{index}", resnet)
        if attentions is not None:
            yield from _attention(f"{path}.attentions.{index}", attentions[index])
        yield _push
    for downsampler in block.downsamplers or ():
        yield _module(downsampler)
    if block.downsamplers:
        yield _push


def _up(path: str, block: Any, last: bool) -> Iterator[Unit]:
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        yield _pop
        yield _resnet(f"{path}.resnets.{index}", resnet)
        if attentions is not None:
            yield from _attention(f"{path}.attentions.{index}", attentions[index])
    for upsampler in block.upsamplers or ():
        yield _upsample(upsampler, last)


def _attention(path: str, attention: Any) -> Iterator[Unit]:
    yield _enter(attention)
    for index, block in enumerate(attention.transformer_blocks):
        inner = f"{path}.transformer_blocks.{index}"
        crosses = bool(block.only_cross_attention)
        yield _attend(f"{inner}.attn1", block.norm1, block.attn1, crosses)
        if block.attn2 is not None:
            yield _attend(f"{inner}.attn2", block.norm2, block.attn2, not block.double_self_attention)
        yield _feed_forward(f"{inner}.ff", block.norm3, block.ff)
        yield _whole(inner)
    yield _leave(path, attention)


def _push(stream: Stream) -> None:
    stream.skips.append(stream.x)


def _pop(stream: Stream) -> None:
    stream.x = torch.cat([stream.x, stream.grown(stream.skips.pop())], dim=1)


def _module(module: nn.Module) -> Unit:
    def unit(stream: Stream) -> None:
        stream.x = module(stream.x)

    return unit


def _upsample(module: nn.Module, last: bool) -> Unit:
    def unit(stream: Stream) -> None:
        size = stream.skips[-1].shape[2:] if stream.resize and not last else None
        stream.x = module(stream.x, size)

    return unit


def _resnet(site: str, module: nn.Module) -> Unit:
    def unit(stream: Stream) -> None:
        stream.replace(site, module(stream.x, stream.time_now()))

    return unit


def _enter(attention: Any) -> Unit:
    linear = attention.use_linear_projection

    def unit(stream: Stream) -> None:
        stream.residual = x = stream.x
        x = attention.norm(x)
        if not linear:
            x = attention.proj_in(x)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        stream.x = attention.proj_in(x) if linear else x

    return unit


def _leave(site: str, attention: Any) -> Unit:
    linear = attention.use_linear_projection

    def unit(stream: Stream) -> None:
        assert stream.residual is not None
        residual, x = stream.grown(stream.residual), stream.x
        if linear:
            x = attention.proj_out(x)
        x = x.view(x.shape[0], *residual.shape[2:], -1).permute(0, 3, 1, 2)
        if not linear:
            x = attention.proj_out(x)
        stream.replace(site, x + residual)

    return unit


def _whole(site: str) -> Unit:
    def unit(stream: Stream) -> None:
        stream.replace(site, stream.x)

    return unit


def _feed_forward(site: str, norm: nn.Module, feed_forward: nn.Module) -> Unit:
    def unit(stream: Stream) -> None:
        stream.add(site, feed_forward(norm(stream.x)))

    return unit


def _attend(site: str, norm: nn.Module, attention: Any, crosses: bool) -> Unit:
    heads = attention.heads

    def by_module(stream: Stream) -> None:
        x = norm(stream.x)
        text = stream.embeds[stream.text[: x.shape[0]]] if crosses else None
        stream.add(site, attention(x, encoder_hidden_states=text))

    def unit(stream: Stream) -> None:
        x = norm(stream.x)
        query = split_heads(attention.to_q(x), heads)
        if crosses:
            text = stream.text[: x.shape[0]]
            key, value = (table[text] for table in stream.keys[site])
        else:
            key, value = split_heads(attention.to_k(x), heads), split_heads(attention.to_v(x), heads)
        merged = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        stream.add(site, attention.to_out[1](attention.to_out[0](merged)))

    return unit if is_plain_attention(attention) else by_module


def is_plain_attention(attention: Any) -> bool:
    """Whether an attention module is what `_attend` computes; any other (xFormers' processor, say) runs as a module."""
    return (
        type(attention.processor).__name__ == "AttnProcessor2_0"
        and not any(has_hooks(module) for module in (attention, attention.to_k, attention.to_v))
        and all(
            getattr(attention, name, None) is None
            for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
        )
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, P, H * d]`` as ``[B, H, P, d]``."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def text_keys(unet: Any, embeds: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values of every condition at every plain cross-attention, by site: ``[K, H, T, d]`` each."""
    tables = {}
    for path, block in unet.named_modules():
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        pairs = [("attn1", block.attn1)] if block.only_cross_attention else []
        if block.attn2 is not None and not block.double_self_attention:
            pairs.append(("attn2", block.attn2))
        for name, attention in pairs:
            if is_plain_attention(attention):
                key, value = attention.to_k(embeds), attention.to_v(embeds)
                tables[f"unet.{path}.{name}"] = split_heads(key, attention.heads), split_heads(value, attention.heads)
    return tables
