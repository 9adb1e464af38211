"""undistilled: plan, run and prove the whole DeepSeek-R1 on the hardware you have."""

import os

__version__ = "0.1.0"

# PyTorch's OpenMP threads look for work for milliseconds after each of its operations, on the cores that our threads
# (ops/cpu/pool.h) need by then: prompts took twice as long. Read when PyTorch is loaded, which comes after this.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
