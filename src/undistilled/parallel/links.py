"""Measures how two processes talk: `python -m undistilled.parallel.links`, a process for each end of a pair.

Latency is of an all-reduce of a token's hidden state, which decoding does twice a layer; the rate is of a message of
64 MiB from one end to the other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

from ..errors import UndistilledError
from ..plan.hardware import Link, Machine
from ..plan.mesh import Mesh
from .local import LOOPBACK

if TYPE_CHECKING:
    import torch

    from .comm import Comm

SMALL, LARGE = 7168, 16 << 20  # float32 elements: R1's hidden state; 64 MiB
ROUNDS = 200
SECONDS = 120  # that a pair may take


def measure_links(machine: Machine, progress: Callable[[str], None]) -> tuple[Link, ...]:
    """The machine's links, with those between its GPUs, or between processes of its CPU, as measured now."""
    gpus = [d.name for d in machine.devices if d.kind == "cuda"]
    pairs = list(combinations(gpus, 2)) or ([] if gpus else [("cpu", "cpu")])
    found = {}
    for a, b in pairs:
        progress(f"{a} – {b}: sums of {SMALL * 4 >> 10} KiB and messages of {LARGE >> 18} MiB")
        found[a, b] = _pair(a, b)
    kept = [link for link in machine.links if (link.a, link.b) not in found]
    return (*kept, *found.values())


def _pair(a: str, b: str) -> Link:
    with tempfile.TemporaryDirectory(prefix="undistilled-") as folder:
        ends = [_end(folder, rank, [a, b]) for rank in (0, 1)]
        until = monotonic() + SECONDS
        while ends[0].poll() is None and not ends[1].poll() and monotonic() < until:
            sleep(0.02)
        late = "" if monotonic() < until else f"no answer within {SECONDS} s; "
        for end in ends:
            end.kill()
        said = ends[0].communicate()[0]
        ends[1].communicate()
        if not said:
            raise UndistilledError(f"{a} – {b}: not measured: {late}{_last_words(folder)}")
    latency, rate = json.loads(said)
    kind = "memory" if a == "cpu" else "nvlink" if rate > 60e9 else "pcie"
    return Link(a=a, b=b, bytes_per_s=rate, latency_s=latency, kind=kind, source="measured")  # type: ignore[arg-type]


def _end(folder: str, rank: int, devices: list[str]) -> subprocess.Popen[str]:
    boot = json.dumps({"devices": devices, "rank": rank, "store": f"{folder}/store"})
    env = os.environ | LOOPBACK | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}/errors{rank}", "w") as errors:
        command = [sys.executable, "-P", "-m", __name__, boot]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)


def _last_words(folder: str) -> str:
    """What both ends said last on standard error: the one that waits for the other says little of why."""
    said = [Path(folder, f"errors{rank}").read_text().strip().splitlines() or ["nothing"] for rank in (0, 1)]
    return "; ".join(f"end {rank} said {lines[-1][-300:]}" for rank, lines in enumerate(said))


def main() -> None:
    import torch

    from .comm import Comm

    boot = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    mesh = Mesh(tp=2, stages=((0, 1),), devices=tuple(boot["devices"]))
    comm = Comm(mesh, boot["rank"], boot["store"])
    wide = comm.device.type == "cpu"  # what decoding sums: float32 on a CPU, BF16 on a GPU
    small = torch.ones(1, SMALL, device=comm.device, dtype=torch.float32 if wide else torch.bfloat16)
    large = torch.ones(LARGE, device=comm.device)
    latency = _reduce(comm, small)
    rate = large.numel() * 4 / _median(lambda: comm.pass_on(large), 5, comm.device.type)
    if boot["rank"] == 0:
        print(json.dumps([latency, rate]))
    comm.close()


def _reduce(comm: Comm, x: torch.Tensor) -> float:
    """Seconds of a sum; on a GPU within a graph of many, as a decode step has them, and no host takes part."""
    import torch

    if comm.device.type == "cpu":
        return _median(lambda: comm.all_reduce(x), ROUNDS, "cpu")
    graph = torch.cuda.CUDAGraph()
    comm.all_reduce(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(ROUNDS):
            comm.all_reduce(x)
    return _median(graph.replay, 10, "cuda") / ROUNDS


def _median(run: Callable[[], object], rounds: int, kind: str) -> float:
    """Seconds a call takes, the first few left out."""
    import torch

    taken = []
    for _ in range(rounds + 5):
        began = perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        taken.append(perf_counter() - began)
    return statistics.median(taken[5:])


if __name__ == "__main__":
    main()
