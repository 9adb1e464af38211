"""Kernels that are launched while the one before them still runs, and wait for it themselves.

Programmatic dependent launch (compute capability 9.0; CUDA Programming Guide, "Programmatic Dependent Launch and
Synchronization"): a launch with `EARLY` hides behind its predecessor's end what it takes to begin. Such a kernel calls
`after()` before it reads or writes memory that any kernel writes, in every program, so that its own end implies all
ends before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

ON = tl.constexpr(
    not triton.knobs.runtime.interpret and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
)
EARLY = {"launch_pdl": True} if ON.value else {}


@triton.jit
def after():
    """Until all that was launched before is done, and its writes are to be seen."""
    if ON:
        gdc_wait()
