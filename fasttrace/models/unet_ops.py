"""The UNet's units on ops: where a site's value is made, the op that makes it also restores it and adds the residual.

The list of `fasttrace.models.unet` in fewer and wider steps, for a GPU, where launches and passes over memory cost
more than arithmetic: group norm and SiLU as one op that stays in channels-last; a convolution's bias and the time
embedding as one shift inside the norm after it; one product for queries, keys and values; text keys read by index;
output projections with restoration and residual in one pass. A module that carries a hook or an adapter, or is of
another class, is called as a module, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.attention_restore import attention_restore
from ..ops.geglu import geglu
from ..ops.group_norm_silu import group_norm_silu
from ..ops.linear_restore import linear_restore
from ..ops.residual_restore import residual_restore
from ..ops.restore import keep_all
from .attention import has_hooks, is_plain_attention
from .description import Description
from .unet import UNetBuilder, is_covered, pixel_count
from .unit import Dims, Forward, SitePoint, Unit


def describe_unet_on_ops(unet: Any) -> Description:
    """The units of a UNet on ops.

    Weights of queries, keys and values, and those of the time embedding's share in all resnets, are joined here, so a
    description is made anew where weights may have changed.
    """
    builder = _OpsBuilder()
    units = list(builder.units(unet))
    return Description("unet", units, ("sample",), ("sample",), is_covered(unet), builder.crossing, builder.begin)


class _OpsBuilder(UNetBuilder):
    def __init__(self) -> None:
        super().__init__()
        self._shifts: list[tuple[nn.Linear, Tensor | None]] = []
        self._shift_width = 0
        self._joined: tuple[Tensor, Tensor] | None = None

    def begin(self, forward: Forward) -> None:
        """The texts' numbers as kernels read them, and by one product what every resnet adds before its second norm:
        the time embedding's share and the first convolution's bias, ``[1 or B, all their channels]``.
        """
        if self._joined is None:
            weights = [linear.weight for linear, _ in self._shifts]
            biases = [
                linear.bias if bias is None else bias if linear.bias is None else linear.bias + bias
                for linear, bias in self._shifts
            ]
            self._joined = torch.cat(weights), torch.cat(biases)
        time = forward.whole("time")
        forward.set_by_row("shifts", functional.linear(functional.silu(time), *self._joined))
        forward.set_by_row("text32", forward.whole("text").int())

    def _resnet(self, path: str, module: Any) -> Iterator[Unit]:
        (plain,) = super()._resnet(path, module)
        if not _is_plain_resnet(module):
            yield plain
            return
        width = module.conv1.weight.shape[0]
        shift = slice(self._shift_width, self._shift_width + width)
        self._shift_width += width
        self._shifts.append((module.time_emb_proj, module.conv1.bias))
        site = f"unet.{path}"
        (point,) = plain.sites
        yield Unit(("x",), ("hidden", "shortcut"), _convolve(module, shift), (), (), plain.flops, plain.alive)

        def add(forward: Forward, hidden: Tensor, shortcut: Tensor) -> Tensor:
            here = forward.inside(site)
            rows, bias, scale = _rows(hidden), module.conv2.bias, module.output_scale_factor
            if here.by_op:
                given = here.source(rows), here.bank(rows)
                value = residual_restore(rows, _rows(shortcut), *given, None, scale, bias)
                return _map(value, hidden)
            value = residual_restore(rows, _rows(shortcut), keep_all(rows), None, None, scale, bias)
            return here.apply(_map(value, hidden))

        yield Unit(("hidden", "shortcut"), ("x",), add, inside=(point,))

    def _entering(self, block: Any) -> Unit:
        plain = super()._entering(block)
        if not (_is_plain(block.norm, nn.GroupNorm) and _is_product(block.proj_in)):
            return plain
        norm, product = block.norm, block.proj_in

        def run(_: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
            normed = group_norm_silu(_rows(x), norm.weight, norm.bias, norm.num_groups, norm.eps, False)
            return x, functional.linear(normed, _matrix(product), product.bias)

        return Unit(plain.reads, plain.writes, run, flops=plain.flops)

    def _leaving(self, block: Any, whole: SitePoint) -> Unit:
        plain = super()._leaving(block, whole)
        if not _is_product(block.proj_out):
            return plain
        product = block.proj_out

        def run(_: Forward, x: Tensor, residual: Tensor) -> Tensor:
            added = linear_restore(x, _matrix(product), product.bias, _rows(residual), keep_all(x))
            return _map(added, residual)

        return Unit(plain.reads, plain.writes, run, (whole,), flops=plain.flops)

    def _attend(
        self, path: str, kind: str, norm: nn.Module, attention: Any, crosses: bool, width: int
    ) -> Iterator[Unit]:
        plain = list(super()._attend(path, kind, norm, attention, crosses, width))
        out = attention.to_out[0]
        linears = (attention.to_q, out, *(() if crosses else (attention.to_k, attention.to_v)))
        if not (is_plain_attention(attention) and all(_is_plain(one, nn.Linear) for one in linears)):
            yield from plain
            return
        first, last, _ = plain
        site = f"unet.{path}"
        run = _cross_heads(site, path, norm, attention) if crosses else _self_heads(site, norm, attention)
        yield Unit(("x",), ("heads",), run, (), (norm,), first.flops, first.alive)
        yield Unit(("x", "heads"), ("x",), _project(site, out), (), (), last.flops, inside=last.sites)

    def _feed_forward(
        self, path: str, norm: nn.Module, feed_forward: Any, width: int, whole: SitePoint
    ) -> Iterator[Unit]:
        plain = list(super()._feed_forward(path, norm, feed_forward, width, whole))
        up, _, down = feed_forward.net
        gated = type(up).__name__ == "GEGLU" and _is_plain(up.proj, nn.Linear)
        if not gated or has_hooks(feed_forward) or has_hooks(up) or not _is_plain(down, nn.Linear):
            yield from plain
            return
        count, inner, site = pixel_count(self.halvings), down.weight.shape[1], f"unet.{path}"

        def widen(forward: Forward, x: Tensor) -> Tensor:
            here = forward.inside(site)
            source = here.source(x) if here.by_op else None
            return geglu(norm(x), up.proj.weight, up.proj.bias, source)

        def alive(dims: Dims) -> int:
            return count(dims) * (3 * width + 2 * inner)

        yield Unit(("x",), ("up",), widen, (), (norm,), self.at_pixels(up), alive)
        narrow, flops = _project(site, down), self.at_pixels(down)
        yield Unit(("x", "up"), ("x",), narrow, (whole,), (), flops, inside=plain[0].sites)


def _convolve(module: Any, shift: slice) -> Callable[[Forward, Tensor], tuple[Tensor, Tensor]]:
    """A resnet up to its second convolution, whose bias is left out, and what its result is added to."""

    def run(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = _norm(module.norm1, _rows(x), None)
        hidden = _convolution(module.conv1, _map(normed, x))
        normed = _norm(module.norm2, _rows(hidden), forward.of_rows("shifts")[:, shift])
        hidden = _convolution(module.conv2, _map(normed, hidden))
        if module.conv_shortcut is None:
            return hidden, x
        product = module.conv_shortcut
        return hidden, _map(functional.linear(_rows(x), _matrix(product), product.bias), x)

    return run


def _self_heads(site: str, norm: nn.Module, attention: Any) -> Callable[[Forward, Tensor], Tensor]:
    projections = (attention.to_q, attention.to_k, attention.to_v)
    weight = torch.cat([one.weight for one in projections])
    bias = None if attention.to_q.bias is None else torch.cat([one.bias for one in projections])
    heads = attention.heads

    def run(forward: Forward, x: Tensor) -> Tensor:
        joined = functional.linear(norm(x), weight, bias).view(*x.shape[:2], 3, heads, -1)
        here = forward.inside(site)
        source = here.source(x) if here.by_op else None
        return attention_restore(*joined.unbind(2), source).flatten(2)

    return run


def _cross_heads(site: str, path: str, norm: nn.Module, attention: Any) -> Callable[[Forward, Tensor], Tensor]:
    query, heads = attention.to_q, attention.heads

    def run(forward: Forward, x: Tensor) -> Tensor:
        key, value = (table.transpose(1, 2) for table in forward.shared["keys"][path])
        text = forward.of_rows("text32").expand(len(x))
        here = forward.inside(site)
        source = here.source(x) if here.by_op else None
        q = functional.linear(norm(x), query.weight, query.bias).view(*x.shape[:2], heads, -1)
        return attention_restore(q, key, value, source, None, None, text).flatten(2)

    return run


def _project(site: str, linear: nn.Linear) -> Callable[[Forward, Tensor, Tensor], Tensor]:
    """A linear layer whose result is a site's value, and the residual."""

    def run(forward: Forward, residual: Tensor, inner: Tensor) -> Tensor:
        here = forward.inside(site)
        if here.by_op:
            given = here.source(inner), here.bank(residual)
            added: Tensor = linear_restore(inner, linear.weight, linear.bias, residual, *given)
            return added
        return residual + here.apply(linear_restore(inner, linear.weight, linear.bias, None, keep_all(inner)))

    return run


def _norm(norm: nn.GroupNorm, rows: Tensor, shift: Tensor | None) -> Tensor:
    shift = None if shift is None else shift.expand(rows.shape[0], -1)
    y: Tensor = group_norm_silu(rows, norm.weight, norm.bias, norm.num_groups, norm.eps, True, shift)
    return y


def _convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
    return functional.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation, module.groups)


def _rows(x: Tensor) -> Tensor:
    """A feature map ``[B, C, h, w]`` in channels-last memory as positions ``[B, h w, C]``."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """Positions ``[B, h w, C]`` as a feature map of the same height and width."""
    return rows.view(rows.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _matrix(product: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a linear layer or of a 1 x 1 convolution."""
    weight = product.weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1)


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not has_hooks(module) and "forward" not in vars(module)


def _is_product(module: Any) -> bool:
    if _is_plain(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return _is_plain(module, nn.Linear)


def _is_plain_resnet(module: Any) -> bool:
    if type(module).__name__ != "ResnetBlock2D" or has_hooks(module):
        return False
    shortcut = module.conv_shortcut
    return (
        module.upsample is None
        and module.downsample is None
        and module.time_embedding_norm == "default"
        and not module.skip_time_act
        and _is_plain(module.nonlinearity, nn.SiLU)
        and (module.dropout.p == 0 or not module.training)
        and not has_hooks(module.dropout)
        and _is_plain(module.time_emb_proj, nn.Linear)
        and all(_is_plain(one, nn.GroupNorm) for one in (module.norm1, module.norm2))
        and all(_is_plain(one, nn.Conv2d) and one.padding_mode == "zeros" for one in (module.conv1, module.conv2))
        and (shortcut is None or _is_product(shortcut))
    )
