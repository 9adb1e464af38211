"""Measures a GPU: what it reads, multiplies and launches, and what its links carry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from .hardware import Ceilings, Device, Link
from .measure import Progress, best_seconds, now

log = logging.getLogger(__name__)

BUFFER = 4 << 30  # bytes read for the bandwidth: far over any L2
COPY = 256 << 20  # bytes copied over a link
SIZES = (2048, 4096, 8192)


def cuda_ceilings(device: Device, seconds: float, progress: Progress) -> Ceilings:
    """RuntimeError where PyTorch cannot use the device."""
    import torch

    with torch.inference_mode(), torch.cuda.device(device.name):
        size = min(BUFFER, device.free_bytes // 4) // (1 << 20) * (1 << 20)
        progress(f"{device.name}: reading {size >> 20} MiB")
        read = _read(device.name, size, seconds * 0.2)
        torch.cuda.empty_cache()  # else cuBLAS's workspace settles in the buffer's segment and keeps it all
        progress(f"{device.name}: multiplying matrices")
        share = seconds * 0.15
        fp32 = _matmul(lambda n: _floats(n, torch.float32), share)
        bf16 = _matmul(lambda n: _floats(n, torch.bfloat16), share)
        fp8 = _matmul(_eights, share) if hasattr(torch, "_scaled_mm") else None
        int8 = _matmul(_bytes, share) if hasattr(torch, "_int_mm") else None
        progress(f"{device.name}: starting small operations")
        launch = _launch(seconds * 0.05)
        torch.cuda.empty_cache()
    wide = bf16 or device.ceilings.bf16_flops
    return Ceilings(
        read_bytes_per_s=read,
        fp32_flops=fp32 or device.ceilings.fp32_flops,
        bf16_flops=wide,
        int8_ops=int8 if int8 and int8 > wide else None,
        fp8_flops=fp8 if fp8 and fp8 > wide else None,
        launch_s=launch,
        source="measured",
        measured_at=now(),
    )


def gpu_seconds(run: Callable[[], Any], seconds: float, repeat: int = 4) -> float:
    """The shortest time of one run, from events on the GPU around `repeat` of them, after a warm-up."""
    import torch

    run()
    torch.cuda.synchronize()
    end, best = time.perf_counter() + seconds, float("inf")
    while True:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(repeat):
            run()
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after) / 1e3 / repeat)
        if time.perf_counter() >= end:
            return max(best, 1e-9)


def _read(name: str, size: int, seconds: float) -> float:
    """Bytes a second: the best of reductions, which only read, and a copy, which reads half of what it moves."""
    import torch

    buffer = torch.ones(size // 4, device=name)
    rows = buffer.view(-1, 1 << 14)
    half = buffer.view(2, -1)
    ways: list[Callable[[], Any]] = [
        buffer.sum,
        lambda: rows.sum(1),
        rows.view(torch.int32).amax,
        lambda: half[0].copy_(half[1]),
    ]
    return size / min(gpu_seconds(way, seconds / len(ways)) for way in ways)


def _floats(n: int, dtype: Any) -> Callable[[], Any]:
    import torch

    # normal numbers: zeros draw less power and let the clocks rise
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return lambda: a @ b.T


def _bytes(n: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randint(-127, 127, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    return lambda: torch._int_mm(a, b.T)


def _eights(n: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _matmul(make: Callable[[int], Callable[[], Any]], seconds: float) -> float | None:
    best = 0.0
    for n in SIZES:
        try:
            best = max(best, 2 * n**3 / gpu_seconds(make(n), seconds / len(SIZES)))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            log.debug("no such product at %s: %s", n, error)
    return best or None


def _launch(seconds: float) -> float:
    """Seconds of one small operation among many, waited for only at the end."""
    import torch

    a, b = torch.ones(1, 64, device="cuda"), torch.ones(1, 64, device="cuda")

    def many() -> None:
        for _ in range(500):
            torch.add(a, b)
        torch.cuda.synchronize()

    return best_seconds(many, seconds, least=5) / 500


def measure_links(known: tuple[Link, ...], gpus: list[str], progress: Progress) -> tuple[Link, ...]:
    """Links between the CPU and each GPU and each pair of GPUs, measured; those that fail stay as they were."""
    import torch

    pairs = [("cpu", g) for g in gpus] + [(a, b) for n, a in enumerate(gpus) for b in gpus[n + 1 :]]
    found = []
    for a, b in pairs:
        progress(f"{a} – {b}: copying {COPY >> 20} MiB")
        before = next((k for k in known if (k.a, k.b) == (a, b)), None)
        try:
            found.append(_link(a, b, before))
        except RuntimeError as error:
            log.debug("%s – %s: %s", a, b, error)
            progress(f"{a} – {b}: not measured: {error}")
            found += [before] if before else []
    torch.cuda.empty_cache()
    return tuple(found)


def _link(a: str, b: str, before: Link | None) -> Link:
    import torch

    target = torch.empty(COPY, dtype=torch.uint8, device=b)
    source = torch.ones(COPY, dtype=torch.uint8, device=a, pin_memory=a == "cpu")
    pageable = None
    if a == "cpu":
        plain = torch.ones(COPY, dtype=torch.uint8)
        pageable = COPY / _copy_seconds(target, plain, b)
    return Link(
        a=a,
        b=b,
        bytes_per_s=COPY / _copy_seconds(target, source, b),
        pageable_bytes_per_s=pageable,
        latency_s=_copy_seconds(target[:64], source[:64], b),
        kind=before.kind if before else "pcie",
        source="measured",
        note=before.note if before else "",
    )


def _copy_seconds(target: Any, source: Any, device: str) -> float:
    import torch

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return best_seconds(copy, 0.2, least=3)
