"""Kernels for CPUs, in C++."""

import os
from pathlib import Path


def kernels_folder() -> Path:
    """Where the built kernels lie: here, unless UNDISTILLED_KERNELS names another folder."""
    return Path(os.environ.get("UNDISTILLED_KERNELS") or Path(__file__).parent)
