"""Configs and launcher of ``quick_gelu``."""

from ..configs import on_its_device
from ..way_up import launch_way_up, way_up_cases
from .kernel import quick_gelu_kernel

# Tile and pipeline by (architecture, size class).
CONFIGS = {
    (80, "few"): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    (80, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    (80, "fp32"): {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    (90, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
}


@on_its_device
def quick_gelu(x, weight, bias, source=None, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.quick_gelu.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    return launch_way_up(quick_gelu_kernel, CONFIGS, weight.shape[0], x, weight, bias, source, out, tile)


# Name, size class, F, K, dtype, whether a source map is given.
TRUE_SHAPES = (
    ("clip_l", "few", 3072, 768, "fp16", True),
    ("clip_l", "many", 3072, 768, "fp16", True),
    ("clip_l", "many", 3072, 768, "bf16", False),
    ("clip_l", "fp32", 3072, 768, "fp32", True),
)


def compile_cases():
    """Every config at the width of CLIP-L, the only text encoder of the family with this activation."""
    return way_up_cases(quick_gelu_kernel, CONFIGS, TRUE_SHAPES)
