"""Measures how two processes talk: `python -m undistilled.parallel.links`, a process for each end of a pair.

Latency is of an all-reduce of a token's hidden state, which decoding does twice a layer; the rate is of a message of
64 MiB from one end to the other. Sums and gatherings are timed at further sizes: other ways serve large ones.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

from ..errors import UndistilledError
from ..plan.hardware import Link, Machine
from ..plan.mesh import Mesh
from .local import LOOPBACK

if TYPE_CHECKING:
    from .comm import Comm

SMALL, LARGE = 7168, 16 << 20  # float32 elements: R1's hidden state; 64 MiB
SUMS = (1, 32, 512, 2048)  # of so many hidden states; and of the most that one shot takes, and of one more
GATHERS = (1 << 18, 5 << 18, 1 << 23)  # bytes over both: R1's logits in BF16 are 1 << 18 a row; and ONE_SHOT
ROUNDS, FEW, MUCH = 200, 6, 4 << 20  # how often, and how often from so many bytes on
SECONDS = 120  # that a pair may take


def measure_links(machine: Machine, progress: Callable[[str], None]) -> tuple[Link, ...]:
    """The machine's links, with those between its GPUs, or between processes of its CPU, as measured now."""
    gpus = [d.name for d in machine.devices if d.kind == "cuda"]
    pairs = list(combinations(gpus, 2)) or ([] if gpus else [("cpu", "cpu")])
    found = {}
    for a, b in pairs:
        progress(f"{a} – {b}: sums, gatherings and messages of up to {LARGE >> 18} MiB")
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
    found = json.loads(said)
    kind = "memory" if a == "cpu" else "nvlink" if found["bytes_per_s"] > 60e9 else "pcie"
    return Link(a=a, b=b, latency_s=found["sums"][0]["seconds"], kind=kind, source="measured", **found)  # type: ignore[arg-type]


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

    from .comm import ONE_SHOT, Comm

    boot = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    mesh = Mesh(tp=2, stages=((0, 1),), devices=tuple(boot["devices"]))
    comm = Comm(mesh, boot["rank"], boot["store"])
    wide = comm.device.type == "cpu"  # what decoding sums: float32 on a CPU, BF16 on a GPU
    dtype = torch.float32 if wide else torch.bfloat16
    large = torch.ones(LARGE, device=comm.device)
    rate = large.numel() * 4 / _median(lambda: comm.pass_on(large), 5, comm.device.type)
    sums, gathers = [], []
    one_shot = ONE_SHOT // (SMALL * dtype.itemsize)
    for rows in sorted((*SUMS, one_shot, one_shot + 1)):
        x = torch.ones(rows, SMALL, device=comm.device, dtype=dtype)
        sums.append({"bytes": x.nbytes, "seconds": _repeated(comm, partial(comm.all_reduce, x), x.nbytes)})
    for nbytes in sorted((*GATHERS, ONE_SHOT)):
        y = torch.ones(1, nbytes // 2 // dtype.itemsize, device=comm.device, dtype=dtype)
        seconds = _repeated(comm, partial(comm.all_gather, y, [y.shape[1]] * 2), nbytes)
        gathers.append({"bytes": nbytes, "seconds": seconds})
    if boot["rank"] == 0:
        print(json.dumps({"bytes_per_s": rate, "sums": sums, "gathers": gathers}))
    comm.close()


def _repeated(comm: Comm, run: Callable[[], object], nbytes: int) -> float:
    """Seconds of a collective; on a GPU within a graph of many, as a decode step has them, and no host takes part."""
    import torch

    rounds = ROUNDS if nbytes < MUCH else FEW
    if comm.device.type == "cpu":
        return _median(run, rounds, "cpu")
    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            run()
    return _median(graph.replay, 10, "cuda") / rounds


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
