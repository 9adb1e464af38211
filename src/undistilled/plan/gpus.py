"""NVIDIA GPUs as the driver describes them, without importing PyTorch. Whatever fails is absent."""

from __future__ import annotations

import logging
import os
from typing import Any

from .hardware import Ceilings, Device, Link

log = logging.getLogger(__name__)

# dense bf16 FLOPs for each fp32 FLOP outside the tensor cores, by compute capability: the ratio of NVIDIA's
# datasheet peaks (A100 312/19.5, RTX 3090 71/35.6, Orin 42.5/5.3, RTX 4090 165/82.6, H100 989/66.9, B200 2250/75)
BF16_PER_FP32 = {80: 16.0, 86: 2.0, 87: 8.0, 89: 2.0, 90: 14.8, 100: 30.0, 103: 30.0, 120: 2.0, 121: 8.0}
INT8_PER_BF16 = {80: 2.0, 86: 4.0, 87: 2.0, 89: 4.0, 90: 2.0, 100: 2.0, 120: 4.0, 121: 2.0}
PCIE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}  # a lane, one direction
LAUNCH_S = 6e-6  # of PyTorch in eager mode, from Python
COPY_S = 1e-5


def probe_gpus(cpu_memory: tuple[int, int]) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
    """GPUs that this process may use, and their links. An integrated GPU shares `cpu_memory`: (total, free) bytes.

    Numbered as CUDA_VISIBLE_DEVICES says, in the order of the bus. CUDA puts faster cards first unless
    CUDA_DEVICE_ORDER is PCI_BUS_ID, so unlike cards can be numbered otherwise there.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:  # no module, no driver, or one that is broken: all mean no GPU to use
        log.debug("no NVML: %s", error)
        return (), ()
    try:
        handles = _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        found = [d for n, h in enumerate(handles) if (d := _ask(_device, nvml, h, n, cpu_memory))]
        links = [link for n, h in enumerate(handles) for link in _ask(_links, nvml, h, n, len(handles)) or []]
        links.sort(key=lambda k: (k.a, k.b))  # the CPU's first
        names = {d.name for d in found} | {"cpu"}
        return tuple(found), tuple(k for k in links if k.a in names and k.b in names)
    finally:
        _ask(nvml.nvmlShutdown)


def _ask(call: Any, *args: Any) -> Any:
    """What the call returns, or None where it fails."""
    try:
        return call(*args)
    except Exception as error:
        log.debug("NVML: %s", error)
        return None


def _visible(nvml: Any, setting: str | None) -> list[Any]:
    """Handles in CUDA's numbering; as CUDA does, it stops at the first entry that names no GPU."""
    handles = [_ask(nvml.nvmlDeviceGetHandleByIndex, n) for n in range(_ask(nvml.nvmlDeviceGetCount) or 0)]
    if setting is None:
        return [h for h in handles if h is not None]
    chosen = []
    for word in (w.strip() for w in setting.split(",")):
        if word.isdigit() and int(word) < len(handles):
            handle = handles[int(word)]
        else:
            handle = next((h for h in handles if word and _uuid(nvml, h).startswith(word)), None)
        if handle is None:
            break
        chosen.append(handle)
    return chosen


def _uuid(nvml: Any, handle: Any) -> str:
    return _string(_ask(nvml.nvmlDeviceGetUUID, handle))


def _string(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


def _device(nvml: Any, handle: Any, number: int, cpu_memory: tuple[int, int]) -> Device | None:
    capability = _ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    if capability is None:
        return None
    sm = capability[0] * 10 + capability[1]
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    total, free = (int(memory.total), int(memory.free)) if memory else cpu_memory
    cores = _ask(nvml.nvmlDeviceGetNumGpuCores, handle) or 1
    return Device(
        name=f"cuda:{number}",
        kind="cuda",
        model=_string(_ask(nvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
        memory_bytes=total,
        free_bytes=min(free, total),
        features=(f"sm_{sm}",),
        cores=cores,
        unified=memory is None,
        ceilings=_estimate(nvml, handle, sm, cores),
        note=_pcie(nvml, handle)[1],
    )


def _estimate(nvml: Any, handle: Any, sm: int, cores: int) -> Ceilings:
    """Peaks from the clocks: two transfers a memory clock, two FLOPs a core and clock."""
    memory_mhz = _ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
    width_bits = _ask(nvml.nvmlDeviceGetMemoryBusWidth, handle)
    core_mhz = _ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    read = 2e6 * memory_mhz * width_bits / 8 if memory_mhz and width_bits else 200e9
    fp32 = 2e6 * core_mhz * cores if core_mhz and cores > 1 else 5e12
    bf16 = fp32 * BF16_PER_FP32.get(sm, 1.0)
    return Ceilings(
        read_bytes_per_s=read,
        fp32_flops=fp32,
        bf16_flops=bf16,
        int8_ops=bf16 * INT8_PER_BF16[sm] if sm in INT8_PER_BF16 else None,
        fp8_flops=2 * bf16 if sm >= 89 else None,
        launch_s=LAUNCH_S,
        source="estimated",
    )


def _pcie(nvml: Any, handle: Any) -> tuple[float, str]:
    """(bytes a second one way, words). The widest that card and slot agree on: an idle card slows its link down."""
    generation, width = (
        _ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        _ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )
    if not generation or not width:
        return 0.0, ""
    now = _ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle), _ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    slower = f", now {now[0]} x{now[1]}" if all(now) and now != (generation, width) else ""
    return PCIE_BYTES.get(generation, 1e9) * width, f"PCIe {generation} x{width}{slower}"


def _links(nvml: Any, handle: Any, number: int, count: int) -> list[Link]:
    rate, words = _pcie(nvml, handle)
    name = f"cuda:{number}"
    found = []
    if rate:
        found.append(
            Link(a="cpu", b=name, bytes_per_s=rate, latency_s=COPY_S, kind="pcie", source="estimated", note=words)
        )
    lanes = sum(1 for n in range(18) if _ask(nvml.nvmlDeviceGetNvLinkState, handle, n) == 1)
    if lanes:
        # 25 GB/s a lane and direction since NVLink 3 (A100, H100); all to all, as through NVSwitch
        found += [
            Link(
                a=name,
                b=f"cuda:{n}",
                bytes_per_s=lanes * 25e9,
                latency_s=COPY_S,
                kind="nvlink",
                source="estimated",
                note=f"{lanes} lanes",
            )
            for n in range(number + 1, count)
        ]
    return found
