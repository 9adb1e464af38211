"""Compiles the optional CPU kernels, once for each kind of processor; everything else is in pyproject.toml.

A build that the compiler cannot make is left out, and without a compiler the package runs on PyTorch alone.
"""

import copy
import os
import runpy
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

CPU = "src/undistilled/ops/cpu"
TABLE = runpy.run_path(f"{CPU}/builds.py")
FLAGS = (
    "-std=c++17 -O3 -g0 -pthread -ffp-contract=off -fno-exceptions -fno-rtti -Wno-psabi "
    "-fno-tree-slp-vectorize"  # it would gather the kernels' scalar pointers in vectors
).split()


def of_these(library):
    """Whether a library is there and of these very sources, as the loader asks."""
    return os.path.exists(library) and TABLE["sources"](Path(CPU)).encode() in Path(library).read_bytes()


class BuildKernels(build_ext):
    """Plain shared libraries, loaded by ctypes: one serves every Python."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext):
        kept = os.path.join("src", self.get_ext_filename(ext.name))
        if not self.force and of_these(kept) and not newer_group(ext.depends + ext.sources, kept):
            self.copy_file(kept, self.get_ext_fullpath(ext.name))  # pip builds in a folder that it forgets
            return
        one = copy.copy(self)  # builds go on side by side: each has its object files to itself
        one.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildKernels, one).build_extension(ext)


def kernels(build):
    return Extension(
        f"undistilled.ops.cpu.{build.file.removesuffix('.so')}",
        sources=sorted(glob(f"{CPU}/*.cpp")),
        depends=["setup.py", f"{CPU}/builds.py", *sorted(glob(f"{CPU}/*.h"))],
        language="c++",
        optional=True,
        extra_link_args=["-pthread"],
        define_macros=[("SOURCES", f'"{TABLE["sources"](Path(CPU))}"')],  # the loader compares them
        extra_compile_args=[*FLAGS, *build.flags],
    )


setup(cmdclass={"build_ext": BuildKernels}, ext_modules=[kernels(build) for build in TABLE["builds"]()])
