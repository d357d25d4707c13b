"""Choosing a config from a table of plain data; nothing is asked of a device before a launch."""

import functools
import inspect

import torch

from .aot import CompileCase

ARCHS = (80, 90)


def arch_of(tensor):
    """Generation of a tensor's GPU as 80, 90, ...; the oldest supported one on a CPU, where kernels are interpreted."""
    return 10 * torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else ARCHS[0]


def config(configs, arch, name):
    """``configs[arch, name]`` of the newest architecture in the table that is not newer than ``arch``."""
    return configs[max(known for known, key in configs if key == name and known <= max(arch, ARCHS[0])), name]


def on_its_device(launcher):
    """Launch on the device of the first operand, a tensor or a list of them: Triton launches on the current device."""
    name = next(iter(inspect.signature(launcher).parameters))

    @functools.wraps(launcher)
    def launch(*args, **kwargs):
        operand = args[0] if args else kwargs[name]
        if not isinstance(operand, torch.Tensor):
            operand = operand[0] if operand else torch.empty(0)
        with torch.cuda.device_of(operand):
            return launcher(*args, **kwargs)

    return launch


def require_adjacent_channels(**tensors):
    """Raise a ``ValueError`` if the last dimension of a tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last dimension must be contiguous")


def compile_case(function, label, tile, arch, arguments, constants, *, has_dot=False):
    """The ``CompileCase`` of one entry: ``tile`` holds the kernel's block sizes and its launch options."""
    blocks = {name: value for name, value in tile.items() if name not in ("num_warps", "num_stages")}
    return CompileCase(
        kernel=function.__name__.removesuffix("_kernel"),
        config=label,
        function=function,
        arguments=arguments,
        constants={**blocks, **constants},
        num_warps=tile["num_warps"],
        num_stages=tile.get("num_stages", 2),
        archs=(arch,),
        has_dot=has_dot,
    )
