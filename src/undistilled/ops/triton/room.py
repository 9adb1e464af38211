"""Shared memory that a program may have: 99 KB on consumer cards, 163 KB on an A100, 227 KB on Hopper."""

from __future__ import annotations

from functools import cache

import torch
import triton


@cache
def room(device: torch.device) -> int:
    """Bytes."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def depth(wanted: int, stage: int, device: torch.device) -> int:
    """Of a pipeline, up to `wanted`: a step holds `stage` bytes. Before Hopper the one that is computed holds none: its
    operands are in registers."""
    if device.type != "cuda":
        return wanted
    computed = int(torch.cuda.get_device_capability(device)[0] < 9)
    return max(1, min(wanted, computed + room(device) // stage))
