"""Configs and launcher of ``geglu``."""

from ..configs import on_its_device
from ..way_up import launch_way_up, way_up_cases
from .kernel import geglu_kernel

# Tile and pipeline by (architecture, size class).
CONFIGS = {
    (80, "few"): {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 4},
    (80, "many"): {"BM": 128, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 4},
    (80, "fp32"): {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    (90, "few"): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
    (90, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}


@on_its_device
def geglu(x, weight, bias, source=None, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.geglu.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    return launch_way_up(geglu_kernel, CONFIGS, weight.shape[0] // 2, x, weight, bias, source, out, tile)


# Name, size class, F, K, dtype, whether a source map is given.
TRUE_SHAPES = (
    ("sd15_320", "many", 1280, 320, "fp16", True),
    ("sdxl_640", "many", 2560, 640, "bf16", False),
    ("sd15_1280", "few", 5120, 1280, "fp16", True),
    ("sd15_320", "fp32", 1280, 320, "fp32", True),
)


def compile_cases():
    """Every config at widths of SD1.x and SDXL."""
    return way_up_cases(geglu_kernel, CONFIGS, TRUE_SHAPES)
