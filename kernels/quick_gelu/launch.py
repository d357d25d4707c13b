"""Launcher of ``quick_gelu``: ``gelu_up`` with CLIP's own activation."""

from ..configs import on_its_device
from ..gelu_up.kernel import gelu_up_kernel
from ..gelu_up.launch import CONFIGS
from ..way_up import launch_way_up, way_up_cases


@on_its_device
def quick_gelu(x, weight, bias, source=None, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.quick_gelu.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    return launch_way_up(gelu_up_kernel, CONFIGS, weight.shape[0], x, weight, bias, source, out, tile, FORM="quick")


# Name, size class, F, K, dtype, whether a source map is given.
TRUE_SHAPES = (
    ("clip_l", "few", 3072, 768, "fp16", True),
    ("clip_l", "many", 3072, 768, "fp16", True),
    ("clip_l", "many", 3072, 768, "bf16", False),
    ("clip_l", "fp32", 3072, 768, "fp32", True),
)


def compile_cases():
    """Every config at the width of CLIP-L, the only text encoder of the family with this activation."""
    return way_up_cases(gelu_up_kernel, CONFIGS, TRUE_SHAPES, FORM="quick")
