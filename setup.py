"""Builds the optional native CPU kernels; everything else is in pyproject.toml.

The extension is compiled with -fopenmp but not linked with an OpenMP runtime: its GOMP_*
symbols resolve at load time to the runtime that PyTorch has loaded, so that both share one
thread pool. Without a compiler the build skips it and the package runs on PyTorch alone.
"""

from setuptools import Extension, setup

CPU = "src/undistilled/ops/cpu"

setup(
    ext_modules=[
        Extension(
            "undistilled.ops.cpu._kernels",
            sources=[f"{CPU}/{name}.cpp" for name in ("kernels", "attend", "experts", "product", "coded", "decode")],
            depends=[f"{CPU}/{name}.h" for name in ("simd", "matrix", "product", "codes", "coded", "scratch")],
            language="c++",
            optional=True,
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-march=native",
                "-fopenmp",
                "-ffp-contract=off",
                "-fno-exceptions",
                "-fno-rtti",
                "-Wno-psabi",
            ],
        )
    ]
)
