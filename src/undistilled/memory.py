"""What processes hold, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_bytes() -> int:
    """The largest resident size of this process so far, in bytes.

    From /proc where there is one: getrusage's figure begins with what the parent held when it started us.
    """
    if Path("/proc/self/status").exists():
        return process_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_on(device: torch.device) -> int:
    """What this process has taken on a device at most so far, in bytes; on a CPU, its largest resident size."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    return peak_bytes()


def process_bytes(field: str, pid: int | str = "self") -> int:
    """A field of a process's /proc/PID/status (Linux)."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def current_bytes() -> int:
    """This process's resident size now, in bytes (Linux; the peak elsewhere)."""
    return process_bytes("VmRSS") if Path("/proc/self/status").exists() else peak_bytes()
