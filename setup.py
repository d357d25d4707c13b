"""Packages, package data, and the optional CUDA extension; everything else about the project stands in pyproject.toml.

``FASTTRACE_BUILD_EXT`` says whether csrc/ is built: ``auto`` (the default) where a CUDA toolkit and a CUDA build of
torch are both visible, ``1`` or an error, ``0`` never. Every op has a Triton or eager twin.
Building needs torch in the build environment: ``FASTTRACE_BUILD_EXT=1 pip install --no-build-isolation .``
"""

import os

from setuptools import find_packages, setup

kernel_packages = ["fasttrace.kernels", *(f"fasttrace.kernels.{name}" for name in find_packages("kernels"))]

TORCH_2_11 = "0x020b000000000000"  # the oldest torch whose stable ABI the binding may use


def why_not():
    """The reason why the extension cannot be built here, or None."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        return f"torch cannot be imported in the build environment ({error}); pass --no-build-isolation"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if CUDA_HOME is None:
        return "no CUDA toolkit found; set CUDA_HOME"
    return None


def extension():
    """Keyword arguments for ``setup``: the extension, or none."""
    wish = os.environ.get("FASTTRACE_BUILD_EXT", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FASTTRACE_BUILD_EXT={wish!r}: expected auto, 0 or 1")
    reason = None if wish == "0" else why_not()
    if wish == "1" and reason:
        raise SystemExit(f"FASTTRACE_BUILD_EXT=1, but the extension cannot be built: {reason}")
    if wish == "0" or reason:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    flags = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_2_11}"]
    module = CUDAExtension(
        "fasttrace._C",
        ["csrc/bindings.cpp", "csrc/rank_update.cu", "csrc/rank_update_cpu.cpp"],
        extra_compile_args={"cxx": flags, "nvcc": flags},
        py_limited_api=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


setup(
    packages=[*find_packages(include=["fasttrace", "fasttrace.*"]), *kernel_packages],
    package_data={
        "fasttrace.zoo.emoji": ["*.md", "*.png", "*.json", "weights/**/*"],
        "fasttrace.zoo.emoji_dit": ["*.md", "*.png", "weights/**/*"],
        "fasttrace": ["py.typed", "data/*.jsonl"],
        "fasttrace.backends": ["README.md"],
        "fasttrace.ops": ["selection.csv"],
        "fasttrace.kernels": ["**/README.md"],
    },
    **extension(),
)
