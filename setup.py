"""Builds the optional native CPU kernels; everything else is in pyproject.toml.

Without a compiler the build skips them and the package runs on PyTorch alone.
UNDISTILLED_MARCH builds for another processor than this one, such as x86-64-v3 (AVX2).
"""

import os

from setuptools import Extension, setup

CPU = "src/undistilled/ops/cpu"
SOURCES = ("pool", "program", "kernels", "rows", "attend", "lift", "router", "experts", "product", "coded", "decode")
HEADERS = ("pool", "program", "simd", "matrix", "product", "codes", "coded", "scratch")

setup(
    ext_modules=[
        Extension(
            "undistilled.ops.cpu._kernels",
            sources=[f"{CPU}/{name}.cpp" for name in SOURCES],
            depends=[f"{CPU}/{name}.h" for name in HEADERS],
            language="c++",
            optional=True,
            extra_link_args=["-pthread"],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                f"-march={os.environ.get('UNDISTILLED_MARCH', 'native')}",
                "-pthread",
                "-ffp-contract=off",
                "-fno-exceptions",
                "-fno-rtti",
                "-Wno-psabi",
            ],
        )
    ]
)
