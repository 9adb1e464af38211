"""Measures this machine's ceilings with PyTorch's own operations, and remembers them.

Each figure is the best of several runs: other work on the machine only ever lowers a rate. What is left of the
error is of the order of a few percent on a quiet machine.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .hardware import Ceilings, Device, Disk, Machine
from .machine_cache import cache_folder, fingerprint, remember
from .probe import probe

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
BUFFER = 1 << 30  # bytes read for the bandwidth: far over any L3
DISK_FILE = 256 << 20  # bytes
CHUNK = 8 << 20  # bytes a read from the disk
LEAST = 2  # runs of anything timed, whatever the budget


def measure(
    machine: Machine | None = None, seconds_budget: float = 20.0, progress: Progress = lambda _: None
) -> Machine:
    """This machine with measured ceilings, also written to the cache. Takes about `seconds_budget` seconds a device.

    UsageError for a machine that is not this one. Where the cache cannot be written, `progress` says so.
    """
    here = probe()
    if machine is not None and fingerprint(machine) != fingerprint(here):
        raise UsageError(f"{machine.name} is not this machine, and only this one can be measured.")
    devices = []
    for device in here.devices:
        devices.append(device.model_copy(update={"ceilings": _ceilings(device, seconds_budget, progress)}))
    links = here.links
    if any(d.kind == "cuda" and d.ceilings.source == "measured" for d in devices):
        from .measure_cuda import measure_links

        links = measure_links(links, [d.name for d in devices if d.kind == "cuda"], progress)
    disk = _measured_disk(here.disk, seconds_budget, progress) if here.disk else None
    measured = here.model_copy(update={"devices": tuple(devices), "links": links, "disk": disk})
    try:
        progress(f"written to {remember(measured)}")
    except OSError as error:
        progress(f"not written to {cache_folder()}: {error.strerror}")
    return measured


def _ceilings(device: Device, seconds: float, progress: Progress) -> Ceilings:
    """Measured, or as they were where the device cannot be used."""
    try:
        if device.kind == "cuda":
            from .measure_cuda import cuda_ceilings

            return cuda_ceilings(device, seconds, progress)
        return _cpu_ceilings(device, seconds, progress)
    except (RuntimeError, MemoryError, ImportError) as error:
        log.debug("%s: %s", device.name, error, exc_info=True)
        progress(f"{device.name}: not measured: {error}")
        return device.ceilings


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def best_seconds(run: Callable[[], Any], seconds: float, least: int = LEAST) -> float:
    """The shortest of as many runs as `seconds` hold, after one that warms up."""
    run()
    end, best, runs = time.perf_counter() + seconds, float("inf"), 0
    while runs < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return max(best, 1e-9)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on `count` threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_ceilings(device: Device, seconds: float, progress: Progress) -> Ceilings:
    import torch

    size = min(BUFFER if seconds >= 5 else BUFFER // 8, device.free_bytes // 4) // (1 << 20) * (1 << 20)
    with torch.inference_mode(), threads(device.cores):
        progress(f"cpu: reading {size >> 20} MiB with {device.cores} threads")
        buffer = torch.ones(max(size, 1 << 20) // 4)  # filled by the threads that read it, for their NUMA nodes
        read = cpu_read(buffer, seconds * 0.3)
        with threads(1):
            progress("cpu: reading with one thread")
            one = cpu_read(buffer[: max(len(buffer) // 4 // 1024, 1) * 1024], seconds * 0.15)
        del buffer
        progress("cpu: multiplying matrices")
        fp32 = matmul_rate(lambda n: _floats(n, torch.float32), seconds * 0.15)
        bf16 = matmul_rate(lambda n: _floats(n, torch.bfloat16), seconds * 0.15)
        int8 = matmul_rate(_bytes, seconds * 0.1) if hasattr(torch, "_int_mm") else None
        progress("cpu: starting small operations")
        launch = cpu_launch(seconds * 0.05)
    return Ceilings(
        read_bytes_per_s=max(read, one),
        read_one_thread_bytes_per_s=one,
        fp32_flops=fp32 or device.ceilings.fp32_flops,
        bf16_flops=bf16 or device.ceilings.bf16_flops,
        int8_ops=int8 if int8 and int8 > (fp32 or 0) else None,
        launch_s=launch,
        source="measured",
        measured_at=now(),
    )


def cpu_read(buffer: Any, seconds: float) -> float:
    """Bytes a second: the best of reductions that only read. Which streams best differs by CPU and library."""
    import torch

    rows = buffer.view(-1, 1024)
    wide = buffer.view(-1, 8192) if len(buffer) % 8192 == 0 else rows
    ones, whole = torch.ones(wide.shape[1]), buffer.view(torch.int64)
    ways = [lambda: wide @ ones, lambda: rows.sum(1), buffer.sum, whole.sum, buffer.view(torch.int32).amax]
    nbytes = len(buffer) * buffer.element_size()
    first = {n: best_seconds(way, 0, least=1) for n, way in enumerate(ways)}
    winners = sorted(first, key=lambda n: first[n])[:2]
    return nbytes / min(best_seconds(ways[n], seconds / 3) for n in winners)


def _floats(n: int, dtype: Any) -> Callable[[], Any]:
    import torch

    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return lambda: a @ b.T


def _bytes(n: int) -> Callable[[], Any]:
    import torch

    a, b = (torch.randint(-127, 127, (n, n), dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.T)


def matmul_rate(make: Callable[[int], Callable[[], Any]], seconds: float) -> float | None:
    """The best rate over square products from 256 up to 4096, as far as `seconds` reach; None without such an op."""
    end, best = time.perf_counter() + seconds, 0.0
    for n in (256, 512, 1024, 2048, 4096):
        left = end - time.perf_counter()
        if best and (LEAST + 1) * 2 * n**3 / best > left:
            break
        try:
            best = max(best, 2 * n**3 / best_seconds(make(n), left / 4))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            log.debug("no such product: %s", error)
            break
    return best or None


def cpu_launch(seconds: float) -> float:
    """Seconds of one small operation: adding 64 numbers, called from Python."""
    import torch

    a, b = torch.ones(1, 64), torch.ones(1, 64)

    def many() -> None:
        for _ in range(500):
            torch.add(a, b)

    return best_seconds(many, seconds, least=5) / 500


def _measured_disk(disk: Disk, seconds: float, progress: Progress) -> Disk:
    size = DISK_FILE if seconds >= 5 else DISK_FILE // 16
    if disk.free_bytes < 8 * size:
        return disk
    progress(f"disk: writing and reading {size >> 20} MiB in {disk.path}")
    try:
        return disk.model_copy(update={"read_bytes_per_s": disk_read(cache_folder(), size)})
    except OSError as error:
        progress(f"disk: not measured: {error.strerror}")
        return disk


def disk_read(folder: Path, size: int) -> float | None:
    """Bytes a second of one reader, best of reading past the page cache and through it after it was emptied.

    None where the system offers neither way: a read from memory would pass for the disk's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="disk-", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            block = os.urandom(CHUNK)
            for _ in range(size // CHUNK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rates = [_read_once(name, direct) for direct in (True, False) for _ in range(2)]
        return max((rate for rate in rates if rate), default=None)
    finally:
        Path(name).unlink(missing_ok=True)


def _read_once(name: str, direct: bool) -> float | None:
    flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
    if not hasattr(os, "O_DIRECT" if direct else "posix_fadvise"):
        return None
    try:
        handle = os.open(name, flags)
    except OSError:
        return None  # tmpfs, for one, refuses O_DIRECT
    try:
        if not direct:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, CHUNK) as buffer:  # whole pages, as O_DIRECT wants
            start, total = time.perf_counter(), 0
            while got := os.readv(handle, [buffer]):
                total += got
            return total / max(time.perf_counter() - start, 1e-9)
    except OSError as error:
        log.debug("disk: %s", error)
        return None
    finally:
        os.close(handle)
