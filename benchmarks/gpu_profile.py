"""Which kernels a decode step of gpu_ranks.py's cases spends its time in, on the GPU alone.

    PYTHONPATH=src python benchmarks/gpu_profile.py CONFIG.json [--cases tp1 tp2] [--rows 1 32]

tp2 is one rank's part without collectives, so that one process does; its plan asks for two GPUs all the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

import gpu_ranks
from gpu_ranks import Member, plan_of
from undistilled.plan.hardware import load_machine

STEPS = 10


class Alone:
    """A Comm whose other ranks add nothing."""

    def __init__(self, mesh, rank: int, _store: str) -> None:
        self.mesh, self.rank = mesh, rank
        self.entered, self.waited = 0, 0.0

    def progress(self) -> None: ...
    def barrier(self) -> None: ...
    def settle(self) -> None: ...

    def agreed(self, yes: bool) -> bool:
        return yes

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        return torch.cat([x] * len(widths), -1)


def profile(member: Member, rows: int) -> tuple[dict[str, list[float]], float]:
    """({kernel: microseconds of each launch in a step}, microseconds from a step's first launch to its last end)."""
    works = [member.rows(range(rows)) for _ in range(STEPS + 4)]
    for work in works[:4]:
        member.part.submit(work)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for work in works[4:]:
            member.part.submit(work)
            torch.cuda.synchronize()
    events = sorted((e for e in seen.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    found = defaultdict(list)
    spans, first, last = [], None, 0.0
    for event in events:
        if first is None or event.time_range.start - last > 150:  # the host between steps
            spans += [last - first] if first is not None else []
            first = event.time_range.start
        last = max(last, event.time_range.end)
        found[event.name].append(event.time_range.end - event.time_range.start)
    return found, median([*spans, last - first])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--cases", nargs="*", default=["tp1", "tp2"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 32])
    args = parser.parse_args()
    gpu_ranks.Comm = Alone
    machine = load_machine("this")
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            plan_of(args.config, case, machine).write(Path(folder) / "plan.json")
            member = Member(args.config, case, 0, Path(folder))
            for rows in args.rows:
                found, span = profile(member, rows)
                total = sum(sum(each) for each in found.values()) / STEPS
                wall = gpu_ranks.steps(member, rows)[0] * 1e3
                print(f"{case}, {rows} rows: {wall:.0f} us a step, {span:.0f} on the GPU, kernels {total:.0f} us")
                for name, each in sorted(found.items(), key=lambda pair: -sum(pair[1]))[:40]:
                    print(f"{sum(each) / STEPS:9.1f} us {len(each) / STEPS:6.1f} x {median(each):6.1f}  {name[:90]}")
        del member
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
