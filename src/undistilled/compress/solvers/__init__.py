"""Ways to choose a weight's values in a given scheme; none of them chooses the scheme."""

from __future__ import annotations

import torch

from ...ops.triton import why_missing


def on_gpu(w: torch.Tensor) -> bool:
    """Whether Triton kernels (gptq_cuda.py, search_cuda.py) solve it; else PyTorch's loops, which they are held to."""
    return w.device.type == "cuda" and not why_missing()
