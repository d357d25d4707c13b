"""diffusers' ``UNet2DConditionModel`` as a list of units.

The units call the model's own modules, so hooks and adapters on them act. Between the modules stands what diffusers'
blocks do around them: residuals, skip connections, attention. The values that flow:

==============  =======================================================================================
``sample``      the latents, and at the end the model's output, ``[B, C, h, w]``
``x``           the stream, ``[B, C, h, w]``, and ``[B, P, D]`` within an attention block
``skip.3``      what the way down kept for the way up, the fourth of them
``residual``    what entered the attention block
``heads``       an attention's result before its output projection, ``[B, P, D]``
``branch``      an attention's or MLP's output, before it is added to ``x``
==============  =======================================================================================

Constants of a forward: ``time`` (``[1 or B, E]``, from `time_states`), ``text`` (``[B]``, each row's number among the
conditions), and shared by all rows ``keys`` (from `text_keys`) and ``embeds`` (``[K, T, D]``, of every condition).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend, has_hooks, is_plain_attention, split_heads
from .description import Description
from .unit import Dims, Forward, SitePoint, Unit, feature_map, pixels, weights_in

_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}


def describe_unet(unet: Any) -> Description:
    """The units of a UNet, on any device, ``meta`` included."""
    builder = UNetBuilder()
    units = list(builder.units(unet))
    return Description("unet", units, ("sample",), ("sample",), is_covered(unet), builder.crossing)


def time_states(
    unet: Any, timestep: Tensor, guidance: Tensor | None, embeds: Tensor, added: dict[str, Tensor] | None
) -> Tensor:
    """Timestep, guidance and added conditions as resnets read them, ``[1 or B, E]``.

    Never part of a compiled graph, whose sines would differ from diffusers' in their last float32 bits.

    Args:
        timestep: ``[1]``.
        guidance: ``[1, E]`` embedding of the guidance scale, for models that take it (LCM).
        embeds: ``[K, T, D]``: what the model's own method wants beside the added conditions.
        added: SDXL's ``text_embeds [B, P]`` and ``time_ids [B, 6]``.
    """
    time: Tensor = unet.time_embedding(unet.get_time_embed(sample=embeds[:1, 0, 0], timestep=timestep), guidance)
    extra = unet.get_aug_embed(emb=time, encoder_hidden_states=embeds, added_cond_kwargs=added)
    if extra is not None:
        time = time + extra
    return time if unet.time_embed_act is None else unet.time_embed_act(time)


def text_keys(description: Description, embeds: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values of every condition ``[K, T, D]`` at every plain cross-attention, by path: ``[K, H, T, d]``."""
    return {
        site: (split_heads(one.to_k(embeds), one.heads), split_heads(one.to_v(embeds), one.heads))
        for site, one in description.crossing.items()
    }


def is_covered(unet: Any) -> bool:
    """Whether the units do all that ``UNet2DConditionModel.forward`` does."""
    if type(unet).__name__ != "UNet2DConditionModel":
        return False
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


class UNetBuilder:
    """Walks a UNet in execution order, and counts halvings and skip connections on the way."""

    def __init__(self) -> None:
        self.halvings = 0
        self.skips: list[str] = []
        self.crossing: dict[str, Any] = {}
        self._pushed = 0
        self._multiple = 1

    def units(self, unet: Any) -> Iterator[Unit]:
        self._multiple = 2 ** getattr(unet, "num_upsamplers", 0)
        first, last = getattr(unet, "conv_in", nn.Identity()), getattr(unet, "conv_out", nn.Identity())
        yield Unit(("sample",), ("x",), lambda _, x: first(x), modules=(first,), flops=self.at_pixels(first))
        yield self.push(first)
        for index, block in enumerate(getattr(unet, "down_blocks", ())):
            yield from self._down(f"down_blocks.{index}", block)
        mid = getattr(unet, "mid_block", None)
        if mid is not None:
            yield from self._pairs("mid_block", mid, lambda: iter(()))
        up_blocks = getattr(unet, "up_blocks", ())
        for index, block in enumerate(up_blocks):
            yield from self._up(f"up_blocks.{index}", block, index == len(up_blocks) - 1)
        norm = getattr(unet, "conv_norm_out", None)

        def end(_: Forward, x: Tensor) -> Tensor:
            y: Tensor = last(x if norm is None else unet.conv_act(norm(x)))
            return y

        yield Unit(("x",), ("sample",), end, modules=(last,), flops=self.at_pixels(last))

    def _down(self, path: str, block: Any) -> Iterator[Unit]:
        for index, resnet in enumerate(getattr(block, "resnets", None) or ()):
            yield from self._resnet(f"{path}.resnets.{index}", resnet)
            yield from self._attention_at(path, block, index)
            yield self.push(resnet)
        for sampler in getattr(block, "downsamplers", None) or ():
            self.halvings += 1
            yield self._sampler(sampler, lambda _, x, sampler=sampler: sampler(x))
            yield self.push(sampler)

    def _up(self, path: str, block: Any, last: bool) -> Iterator[Unit]:
        yield from self._pairs(path, block, self._pop)
        for sampler in getattr(block, "upsamplers", None) or ():
            self.halvings -= 1
            yield self._sampler(sampler, self._upsample(sampler, self.halvings, last))

    def _pairs(self, path: str, block: Any, before: Callable[[], Iterator[Unit]]) -> Iterator[Unit]:
        """Resnets and attention blocks in turn, a resnet first; the mid block ends with a resnet too."""
        for index, resnet in enumerate(getattr(block, "resnets", None) or ()):
            yield from before()
            yield from self._resnet(f"{path}.resnets.{index}", resnet)
            yield from self._attention_at(path, block, index)

    def _attention_at(self, path: str, block: Any, index: int) -> Iterator[Unit]:
        attentions = list(getattr(block, "attentions", None) or ())
        if index < len(attentions) and hasattr(attentions[index], "transformer_blocks"):
            yield from self._attention(f"{path}.attentions.{index}", attentions[index])

    def push(self, module: Any) -> Unit:
        """``x`` is kept for the way up."""
        name = f"skip.{self._pushed}"
        self._pushed += 1
        self.skips.append(name)
        shape = feature_map(_width(module), self.halvings)
        return Unit(("x",), (name,), lambda _, x: x, shapes=(shape,))

    def _pop(self) -> Iterator[Unit]:
        """What was kept last joins ``x`` as further channels."""
        if self.skips:
            yield Unit(("x", self.skips.pop()), ("x",), lambda _, x, skip: torch.cat([x, skip], dim=1))

    def _sampler(self, module: Any, run: Callable[..., Tensor]) -> Unit:
        return Unit(("x",), ("x",), run, modules=(module,), flops=self.at_pixels(module))

    def _upsample(self, module: Any, halvings: int, last: bool) -> Callable[[Forward, Tensor], Tensor]:
        multiple = self._multiple

        def run(forward: Forward, x: Tensor) -> Tensor:
            dims = forward.dims
            uneven = not last and bool(dims.height % multiple or dims.width % multiple)
            y: Tensor = module(x, dims.halved(halvings) if uneven else None)
            return y

        return run

    def at_pixels(self, module: nn.Module) -> Callable[[Dims], float]:
        weights, count = weights_in(module), pixel_count(self.halvings)
        return lambda dims: 2 * weights * count(dims)

    def _resnet(self, path: str, module: Any) -> Iterator[Unit]:
        width, count = _width(module), pixel_count(self.halvings)
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        weights = sum(layer.weight.numel() for layer in convolutions)
        entering = convolutions[0].weight.shape[1] if convolutions else 0
        point = SitePoint(path, "resnet", "x", feature_map(width, self.halvings), module)
        yield Unit(
            ("x",),
            ("x",),
            lambda forward, x: module(x, forward.of_rows("time")),
            (point,),
            (module,),
            lambda dims: 2 * weights * count(dims),
            # Input, its normalised copy and activation, and the first convolution's output.
            lambda dims: count(dims) * (3 * entering + width),
        )

    def _attention(self, path: str, block: Any) -> Iterator[Unit]:
        yield self._entering(block)
        for index, inner in enumerate(block.transformer_blocks):
            yield from self._transformer(f"{path}.transformer_blocks.{index}", inner)
        shape = feature_map(block.proj_out.weight.shape[0], self.halvings)
        yield self._leaving(block, SitePoint(path, "hidden", "x", shape, block, listed=False))

    def _entering(self, block: Any) -> Unit:
        run = _entering(block, block.use_linear_projection)
        return Unit(("x",), ("residual", "x"), run, flops=self.at_pixels(block.proj_in))

    def _leaving(self, block: Any, whole: SitePoint) -> Unit:
        run = _leaving(block, block.use_linear_projection)
        return Unit(("x", "residual"), ("x",), run, (whole,), flops=self.at_pixels(block.proj_out))

    def _transformer(self, path: str, block: Any) -> Iterator[Unit]:
        width = block.norm1.weight.shape[0]
        crosses = bool(block.only_cross_attention)
        kind = "cross_attn" if crosses else "self_attn"
        yield from self._attend(f"{path}.attn1", kind, block.norm1, block.attn1, crosses, width)
        if block.attn2 is not None:
            crosses = not block.double_self_attention
            yield from self._attend(f"{path}.attn2", "cross_attn", block.norm2, block.attn2, crosses, width)
        whole = SitePoint(path, "hidden", "x", pixels(width, self.halvings), block, listed=False)
        yield from self._feed_forward(f"{path}.ff", block.norm3, block.ff, width, whole)

    def _feed_forward(
        self, path: str, norm: nn.Module, feed_forward: Any, width: int, whole: SitePoint
    ) -> Iterator[Unit]:
        """An MLP, and the end of its transformer block."""
        count, inner = pixel_count(self.halvings), feed_forward.net[2].weight.shape[1]
        yield Unit(
            ("x",),
            ("branch",),
            lambda _, x: feed_forward(norm(x)),
            (SitePoint(path, "mlp", "branch", pixels(width, self.halvings), feed_forward),),
            (norm, feed_forward),
            self.at_pixels(feed_forward),
            # Two residuals, the input and its normalised copy; value and gate, the gate's activation, their product.
            lambda dims: count(dims) * (4 * width + 4 * inner),
        )
        yield Unit(ADD.reads, ADD.writes, ADD.run, (whole,))

    def _attend(
        self, path: str, kind: str, norm: nn.Module, attention: Any, crosses: bool, width: int
    ) -> Iterator[Unit]:
        count = pixel_count(self.halvings)
        point = SitePoint(path, kind, "branch", pixels(width, self.halvings), attention)
        projections = (attention.to_q, *(() if crosses else (attention.to_k, attention.to_v)))
        weights = weights_in(*projections)

        def flops(dims: Dims) -> float:
            length = dims.tokens if crosses else count(dims)
            return count(dims) * (2 * weights + 4 * length * width)

        def alive(dims: Dims) -> int:
            return count(dims) * 6 * width

        out = self.at_pixels(attention.to_out)
        if is_plain_attention(attention):
            if crosses:
                self.crossing[path] = attention
            modules = (norm, *projections)
            yield Unit(("x",), ("heads",), _heads(path, norm, attention, crosses), (), modules, flops, alive)
            to_out = attention.to_out
            yield Unit(
                ("heads",), ("branch",), lambda _, x: to_out[1](to_out[0](x)), (point,), (to_out[0], to_out[1]), out
            )
        else:
            run = _by_module(norm, attention, crosses)
            yield Unit(
                ("x",), ("branch",), run, (point,), (norm, attention), lambda dims: flops(dims) + out(dims), alive
            )
        yield ADD


ADD = Unit(("x", "branch"), ("x",), lambda _, x, branch: x + branch)


def _heads(path: str, norm: nn.Module, attention: Any, crosses: bool) -> Callable[[Forward, Tensor], Tensor]:
    heads = attention.heads

    def run(forward: Forward, x: Tensor) -> Tensor:
        x = norm(x)
        query = split_heads(attention.to_q(x), heads)
        if crosses:
            text = forward.of_rows("text")
            key, value = (table[text] for table in forward.shared["keys"][path])
        else:
            key, value = split_heads(attention.to_k(x), heads), split_heads(attention.to_v(x), heads)
        return attend(query, key, value).transpose(1, 2).flatten(2)

    return run


def _by_module(norm: nn.Module, attention: Any, crosses: bool) -> Callable[[Forward, Tensor], Tensor]:
    def run(forward: Forward, x: Tensor) -> Tensor:
        embeds = forward.shared["embeds"][forward.of_rows("text")] if crosses else None
        value: Tensor = attention(norm(x), encoder_hidden_states=embeds)
        return value

    return run


def _entering(block: Any, linear: bool) -> Callable[[Forward, Tensor], tuple[Tensor, Tensor]]:
    def run(_: Forward, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = block.norm(residual)
        if not linear:
            x = block.proj_in(x)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        return residual, block.proj_in(x) if linear else x

    return run


def _leaving(block: Any, linear: bool) -> Callable[[Forward, Tensor, Tensor], Tensor]:
    def run(_: Forward, x: Tensor, residual: Tensor) -> Tensor:
        if linear:
            x = block.proj_out(x)
        x = x.view(x.shape[0], *residual.shape[2:], -1).permute(0, 3, 1, 2)
        if not linear:
            x = block.proj_out(x)
        return x + residual

    return run


def pixel_count(halvings: int) -> Callable[[Dims], int]:
    def count(dims: Dims) -> int:
        height, width = dims.halved(halvings)
        return height * width

    return count


def _width(module: Any) -> int:
    """Channels of what a resnet, sampler or convolution gives."""
    for name in ("conv2", "conv"):
        if hasattr(module, name):
            module = getattr(module, name)
            break
    weight = getattr(module, "weight", None)
    return 0 if weight is None else int(weight.shape[0])
