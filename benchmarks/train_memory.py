"""Peak memory of a training step: activations kept, recomputed or offloaded; optimizer states whole or sharded.

Claims H1 and H3.

    python benchmarks/train_memory.py activations [--tokens 65536]
    torchrun --nproc-per-node 2 benchmarks/train_memory.py zero [--tokens 4096]

Random tokens, r1-nano's shape. On a GPU the figures are the allocator's peak; on a CPU only optimizer bytes are told.
Two ranks that share one GPU talk over gloo, since NCCL wants a GPU for each.
"""

from __future__ import annotations

import argparse
import gc
import json
from contextlib import nullcontext
from time import perf_counter

import torch
import torch.distributed as dist

from undistilled.model.spec import spec_from_config
from undistilled.ops.registry import force_reference
from undistilled.tune import memory, ranks
from undistilled.tune.examples import Document
from undistilled.tune.loop import Recipe, Trainer
from undistilled.tune.nano import CONFIG, VOCABULARY
from undistilled.tune.packing import Sample, pack

STEPS, LENGTH = 6, 512


def sample(tokens: int, device: torch.device) -> Sample:
    ids = torch.randint(3, VOCABULARY - 20, (tokens // LENGTH, LENGTH)).tolist()
    return pack([Document(row, 1, "random") for row in ids], tokens).to(device)


def measure(tokens: int, device: torch.device, **options) -> dict:
    """Peak bytes of the allocator over STEPS steps, what was held before them, and the median milliseconds a step."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(spec_from_config(CONFIG), Recipe(1e9, tokens), device, **options)
    batch, times = sample(tokens, device), []
    for _ in range(STEPS):
        began = perf_counter()
        float(trainer.one(batch)[1])
        times.append(perf_counter() - began)
    states = ranks.state_bytes(trainer.optimizer)
    weights = sum(p.numel() * p.element_size() for p in trainer.student.parameters())
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return {
        "options": options,
        "tokens": tokens,
        "weight_bytes": weights,
        "optimizer_bytes": states,
        "peak_bytes": peak,
        "activation_bytes": peak - 2 * weights - states if peak else None,
        "ms_a_step": 1e3 * sorted(times[1:])[len(times) // 2 - 1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("activations", "zero"))
    parser.add_argument("--tokens", type=int, default=None)
    arguments = parser.parse_args()
    device = ranks.start()
    tokens = arguments.tokens or (65536 if device.type == "cuda" else 1024)
    if arguments.what == "activations":
        for way in memory.WAYS:
            print(json.dumps(measure(tokens, device, activations=way)), flush=True)
        return
    for zero in (False, True):
        found = measure(tokens, device, zero=zero)
        print(json.dumps(found | {"rank": dist.get_rank(), "ranks": dist.get_world_size()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with nullcontext() if torch.cuda.is_available() else force_reference():  # the CPU's kernels have no gradients
        main()
