"""Looks at this machine: what it has, not how fast it is. Quick, imports no PyTorch, and never raises."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from ..ops.cpu.builds import Build, choose, cpuinfo
from .cgroup import cpu_quota, memory_room
from .gpus import probe_gpus
from .hardware import Ceilings, Device, Disk, Machine
from .machine_cache import cache_folder

log = logging.getLogger(__name__)

X86 = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}
MAC = {"hw.optional.neon": "neon", "hw.optional.arm.FEAT_DotProd": "dotprod", "hw.optional.arm.FEAT_I8MM": "i8mm",
       "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.avx2_0": "avx2"}  # fmt: skip


def probe() -> Machine:
    """This machine, its rates estimated. A part that cannot be read is left out."""
    total, free = memory()
    gpus, links = probe_gpus((total, free))
    torch, note = torch_version(), ""
    if gpus and "+cpu" in torch:
        note = f"{gpus[0].model} is here, but torch {torch} is built without CUDA and cannot use it."
        gpus, links = (), ()
    return Machine(
        name=platform.node() or "this",
        devices=(_cpu(total, free, any(g.unified for g in gpus)), *gpus),
        links=links,
        disk=_disk(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        python=platform.python_version(),
        torch=torch,
        note=note,
    )


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu(total: int, free: int, unified: bool) -> Device:
    fields = cpuinfo()
    cores, (model, features), nodes = usable_cores(), cpu_model(fields), numa_nodes()
    return Device(
        name="cpu",
        kind="cpu",
        model=model,
        memory_bytes=total,
        free_bytes=free,
        features=features,
        cores=cores,
        numa_nodes=nodes,
        unified=unified,
        bf16_products=bf16_products(fields),
        int16_products=int16_products(fields),
        ceilings=_estimate(cores, features, nodes),
    )


def bf16_products(fields: dict[str, str]) -> bool:
    """Whether our kernels multiply in BF16 on a processor with these fields of cpuinfo."""
    build = choose(fields)
    return isinstance(build, Build) and build.rounds


def int16_products(fields: dict[str, str]) -> bool:
    """Whether our kernels multiply integers with instructions of their own on such a processor."""
    build = choose(fields)
    return isinstance(build, Build) and build.integers


def usable_cores() -> int:
    """Logical cores that this process may run on: affinity, and whole cores of the cgroup's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    # half a core more would keep every other thread waiting at each barrier
    return max(1, min(cores, int(quota)) if quota else cores)


def cpu_model(fields: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """(model, the instruction sets that kernels choose by) from the fields of cpuinfo."""
    if sys.platform == "darwin":
        return _mac_cpu()
    flags = set(fields.get("flags", "").split())
    features = [name for name in X86 if name in flags]
    arm = set(fields.get("features", "").split())
    features += [name for flag, name in ARM.items() if flag in arm]
    model = fields.get("model name") or platform.processor() or platform.machine() or "CPU"
    return model, tuple(features)


def _mac_cpu() -> tuple[str, tuple[str, ...]]:
    names = [name for key, name in MAC.items() if _sysctl(key) == "1"]
    more = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".lower().split()
    names += [name for name in X86 if name in more and name not in names]
    return _sysctl("machdep.cpu.brand_string") or "Apple CPU", tuple(names)


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def memory() -> tuple[int, int]:
    """(total, free) bytes of main memory, or of what the cgroup allows. Unknown: 1 byte, none free."""
    try:
        import psutil

        seen = psutil.virtual_memory()
        total, free = int(seen.total), int(seen.available)
    except Exception as error:
        log.debug("no psutil: %s", error)
        total, free = _sysconf("SC_PHYS_PAGES") or 1, _sysconf("SC_AVPHYS_PAGES")
    room = memory_room()
    if room:
        total, free = min(total, max(room[0], 1)), min(free, room[1])
    return total, min(free, total)


def _sysconf(name: str) -> int:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


NODES = Path("/sys/devices/system/node")


def listed(file: str, folder: Path = NODES) -> set[int]:
    """The numbers that a file of the system's lists, as 0-1,3. OSError or ValueError where it does not say."""
    spans = [part.split("-") for part in (folder / file).read_text().strip().split(",") if part]
    return {number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)}


def node_cores(folder: Path = NODES) -> dict[int, frozenset[int]]:
    """NUMA node -> its cores that this process may run on, where it has any and memory too, so that it is no GPU's;
    nothing where the system does not say."""
    try:
        here = os.sched_getaffinity(0)
        both = sorted(listed("has_memory", folder) & listed("has_cpu", folder))
        found = {node: frozenset(listed(f"node{node}/cpulist", folder) & here) for node in both}
    except (OSError, ValueError, AttributeError):
        return {}
    return {node: cores for node, cores in found.items() if cores}


def numa_nodes(folder: Path = NODES) -> int:
    """NUMA nodes that have memory; 1 where the system does not say."""
    try:
        return max(1, len(listed("has_memory", folder)))
    except (OSError, ValueError):
        return max(1, len(list(folder.glob("node[0-9]*"))))


def _disk() -> Disk | None:
    """The disk that holds, or would hold, the cache."""
    folder = cache_folder()
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        return Disk(path=str(folder), free_bytes=shutil.disk_usage(there).free)
    except (OSError, StopIteration) as error:
        log.debug("no disk: %s", error)
        return None


def _estimate(cores: int, features: tuple[str, ...], nodes: int) -> Ceilings:
    """A guess by instruction set, for a core of 2.5 GHz: good to a factor of two or three.

    bf16 without its own instructions is a tenth of fp32: PyTorch 2.13 measured on Zen 3.
    """
    wide = 64 if "avx512f" in features else 32 if "avx2" in features else 16
    fp32 = 0.7 * cores * 2.5e9 * wide
    faster = 5.0 if "amx_bf16" in features else 1.6 if {"avx512_bf16", "bf16"} & set(features) else 0.1
    node = 120e9 if cores >= 24 * nodes else 40e9  # many channels, as a server has, or two
    eight_bit = 8.0 if "amx_int8" in features else 2.0 if {"avx512_vnni", "avx_vnni", "i8mm"} & set(features) else 0.0
    return Ceilings(
        read_bytes_per_s=min(cores * 8e9, nodes * node),
        fp32_flops=fp32,
        bf16_flops=fp32 * faster,
        int8_ops=fp32 * eight_bit or None,
        launch_s=3e-6,
        source="estimated",
    )
