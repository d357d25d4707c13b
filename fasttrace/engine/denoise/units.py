"""A UNet as one flat list of units with a place for rows to join, be overwritten or recorded at every site.

The units call the shadow's own modules, so hooks and adapters on them act. Between the modules stands what diffusers'
blocks do around them (residuals, skip connections, attention), written once more here; `flat_units` returns ``None``
for a UNet with anything else in it, which then runs by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .stream import Stream

_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}

FEW_SCORES = 64 * 64
"""Of one head; more are left to torch's own attention."""


@dataclass(frozen=True)
class Unit:
    """One stretch of the forward.

    Attributes:
        run: takes the stream through it; returns the value of the site where it ends, if there is one.
        site: that site, or ``""``.
        adds: whether the value is added to what came before it, or takes its place.
        keeps: skip connections that it makes, or takes if negative.
    """

    run: Callable[[Stream], Tensor | None]
    site: str = ""
    adds: bool = False
    keeps: int = 0


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
    yield PUSH
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
        yield PUSH
    for downsampler in block.downsamplers or ():
        yield _module(downsampler)
    if block.downsamplers:
        yield PUSH


def _up(path: str, block: Any, last: bool) -> Iterator[Unit]:
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        yield POP
        yield _resnet(f"{path}.resnets.{index}", resnet)
        if attentions is not None:
            yield from _attention(f"{path}.attentions.{index}", attentions[index])
    for upsampler in block.upsamplers or ():
        yield _upsample(upsampler, last)


def _attention(path: str, attention: Any) -> Iterator[Unit]:
    yield _enter(path, attention)
    for index, block in enumerate(attention.transformer_blocks):
        inner = f"{path}.transformer_blocks.{index}"
        crosses = bool(block.only_cross_attention)
        yield _attend(f"{inner}.attn1", block.norm1, block.attn1, crosses)
        if block.attn2 is not None:
            yield _attend(f"{inner}.attn2", block.norm2, block.attn2, not block.double_self_attention)
        yield _feed_forward(f"{inner}.ff", block.norm3, block.ff)
        yield _whole(inner)
    yield _leave(path, attention)


PUSH = Unit(Stream.push, keeps=1)
POP = Unit(Stream.pop, keeps=-1)


def _module(module: nn.Module) -> Unit:
    def run(stream: Stream) -> None:
        stream.x = module(stream.x)

    return Unit(run)


def _upsample(module: nn.Module, last: bool) -> Unit:
    def run(stream: Stream) -> None:
        stream.x = module(stream.x, stream.skip_size() if stream.resize and not last else None)

    return Unit(run)


def _resnet(site: str, module: nn.Module) -> Unit:
    return Unit(lambda stream: module(stream.x, stream.time_now()), site)


def _enter(path: str, attention: Any) -> Unit:
    linear = attention.use_linear_projection

    def run(stream: Stream) -> None:
        x = attention.norm(stream.keep_residual(path))
        if not linear:
            x = attention.proj_in(x)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        stream.x = attention.proj_in(x) if linear else x

    return Unit(run)


def _leave(site: str, attention: Any) -> Unit:
    linear = attention.use_linear_projection

    def run(stream: Stream) -> Tensor:
        residual, x = stream.take_residual(site), stream.x
        if linear:
            x = attention.proj_out(x)
        x = x.view(x.shape[0], *residual.shape[2:], -1).permute(0, 3, 1, 2)
        if not linear:
            x = attention.proj_out(x)
        value: Tensor = x + residual
        return value

    return Unit(run, site)


def _whole(site: str) -> Unit:
    return Unit(lambda stream: stream.x, site)


def _feed_forward(site: str, norm: nn.Module, feed_forward: nn.Module) -> Unit:
    return Unit(lambda stream: feed_forward(norm(stream.x)), site, adds=True)


def _attend(site: str, norm: nn.Module, attention: Any, crosses: bool) -> Unit:
    heads = attention.heads

    def by_module(stream: Stream) -> Tensor:
        x = norm(stream.x)
        value: Tensor = attention(
            x, encoder_hidden_states=stream.embeds[stream.text[: x.shape[0]]] if crosses else None
        )
        return value

    def run(stream: Stream) -> Tensor:
        x = norm(stream.x)
        query = split_heads(attention.to_q(x), heads)
        if crosses:
            text = stream.text[: x.shape[0]]
            key, value = (table[text] for table in stream.keys[site])
        else:
            key, value = split_heads(attention.to_k(x), heads), split_heads(attention.to_v(x), heads)
        merged = attend(query, key, value).transpose(1, 2).flatten(2)
        projected: Tensor = attention.to_out[1](attention.to_out[0](merged))
        return projected

    return Unit(run if is_plain_attention(attention) else by_module, site, adds=True)


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


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of ``[B, H, P, d]`` to ``[B, H, T, d]``.

    On a CPU a matrix of few scores stays in the cache, and two products are up to twice as fast as the kernel that is
    made to never hold them.
    """
    scores = query.shape[2] * key.shape[2]
    if query.device.type != "cpu" or scores > FEW_SCORES:
        return scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
    return weights @ value


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
