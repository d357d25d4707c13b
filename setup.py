"""Packages and package data; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

kernel_packages = ["fasttrace.kernels", *(f"fasttrace.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["fasttrace", "fasttrace.*"]), *kernel_packages],
    package_data={
        "fasttrace.zoo.emoji": ["*.md", "*.png", "*.json", "weights/**/*"],
        "fasttrace": ["py.typed", "data/*.jsonl"],
        "fasttrace.kernels": ["**/README.md"],
    },
)
