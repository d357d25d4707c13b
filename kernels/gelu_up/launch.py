"""Configs and launcher of ``gelu_up``."""

from ..configs import on_its_device
from ..way_up import launch_way_up, way_up_cases
from .kernel import gelu_up_kernel

# Tile and pipeline by (architecture, size class).
CONFIGS = {
    (80, "few"): {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
    (80, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    (80, "fp32"): {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    (90, "many"): {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
}


@on_its_device
def gelu_up(x, weight, bias, source=None, tanh=False, *, out=None, tile=None):
    """Launch the kernel: arguments and result of ``fasttrace.ops.gelu_up.reference``.

    ``out`` is for tests; ``tile`` overrides the config, for tests and tuning.

    Raises:
        ValueError: ``x`` whose channels are not adjacent in memory.
    """
    form = "tanh" if tanh else "erf"
    return launch_way_up(gelu_up_kernel, CONFIGS, weight.shape[0], x, weight, bias, source, out, tile, FORM=form)


# Name, size class, F, K, dtype, whether a source map is given.
EXACT_SHAPES = (
    ("clip_h", "few", 4096, 1024, "fp16", True),
    ("clip_bigg", "many", 5120, 1280, "fp16", True),
    ("clip_h", "fp32", 4096, 1024, "fp32", True),
)
TANH_SHAPES = (
    ("sd3", "many", 6144, 1536, "bf16", True),
    ("flux", "many", 12288, 3072, "bf16", False),
)


def compile_cases():
    """OpenCLIP's encoders by the error function, transformers by tanh."""
    exact = way_up_cases(gelu_up_kernel, CONFIGS, EXACT_SHAPES, FORM="erf")
    return exact + way_up_cases(gelu_up_kernel, CONFIGS, TANH_SHAPES, FORM="tanh")
