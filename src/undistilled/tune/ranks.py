"""Training over several processes: gradients averaged by DDP, optimizer states in shards by ZeRO (claim H3)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UsageError


def start() -> torch.device:
    """This process's device, joined to the others where torchrun started several. Ranks that share a GPU use gloo."""
    cuda = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        own = cuda and torch.cuda.device_count() >= size
        dist.init_process_group("nccl" if own else "gloo")
        if own:
            torch.cuda.set_device(dist.get_rank())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def leads() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def add_up(tensor: torch.Tensor) -> None:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def spread(student: nn.Module, device: torch.device) -> nn.Module:
    """The module whose backward averages gradients over all ranks."""
    if not dist.is_initialized():
        return student
    from torch.nn.parallel import DistributedDataParallel

    on = [device] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=on, broadcast_buffers=False)


def optimizer(groups: list[dict[str, Any]], rate: float, device: torch.device, zero: bool) -> torch.optim.Optimizer:
    """AdamW over the groups; with `zero` each rank keeps the states of its share of the parameters alone."""
    options: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.95), "fused": device.type == "cuda"}
    if not zero:
        return torch.optim.AdamW(groups, **options)
    if not dist.is_initialized():
        raise UsageError("Optimizer states are shared between ranks; there is one.", "Start with torchrun.")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The optimizer's whole state; None on ranks that do not lead where it lies in shards."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        if not leads():
            return None
    return optimizer.state_dict()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that this rank keeps."""
    inner = getattr(optimizer, "optim", optimizer)
    return sum(t.numel() * t.element_size() for s in inner.state.values() for t in s.values() if torch.is_tensor(t))
