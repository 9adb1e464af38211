"""Without a GPU, tests marked `interpreted` run in Triton's interpreter: they take kernels for the CPU's tensors.

    pip install --target FOLDER --no-deps triton==3.6.0 numpy==2.2.6
    TRITON_INTERPRET=1 PYTHONPATH=FOLDER pytest tests/gpu/test_tiles.py
"""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import ptx

    from undistilled.ops import triton as cuda
    from undistilled.ops.triton import experts, linear, router, tiles

    ptx.install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_here", lambda weight, dtype: dtype is torch.bfloat16)
        for kernels in (experts, linear, router, tiles):  # a split's counters belong to a CUDA stream
            patch.setattr(kernels, "counters", lambda device, blocks: torch.zeros(blocks, dtype=torch.int32))
        yield
