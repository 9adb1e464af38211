"""A pool of processes that do many layouts' passes one after another: starting Python for each would take minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from undistilled.checkpoint.resolve import find
from undistilled.generate.part import Part
from undistilled.generate.programs import Programs
from undistilled.generate.runner import Runner
from undistilled.load.build import build
from undistilled.parallel.comm import Comm
from undistilled.parallel.local import LOOPBACK
from undistilled.parallel.messages import Pass
from undistilled.parallel.share import share
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.plan import Plan
from undistilled.plan.ranks import cuts_of
from undistilled.plan.solve import Ask, solve
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work

MOST = 4


@dataclass
class Cell:
    """One run: a checkpoint, a scheme and how many ranks."""

    folder: str
    scheme: str
    degrees: dict = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    device: str | None = "cpu"  # None: GPUs
    dtype: str = "float32"
    replayed: bool = True
    sockets: bool = False  # for sums too
    recorded: bool = False  # it is an error where a rank's decode passes were not

    def plan(self) -> Plan:
        model = find(self.folder)
        cache = "float32" if self.dtype in ("float32", "int16") else None
        ask = Ask(self.scheme, 64, 4, device=self.device, kv_dtype=cache, dtype=self.dtype)
        ask = Ask(**{**vars(ask), "degrees": Degrees(**self.degrees)})
        made = solve(model.name, model.config, model.spec, load_machine("this"), ask)
        if self.shares and made.mesh:
            made = made.model_copy(update={"mesh": made.mesh.model_copy(update={"shares": tuple(self.shares)})})
        return made


def works() -> list[tuple[list[Work], bool]]:
    """Two prompts, then rows of both together: tokens are given, not chosen, so that layouts compare."""
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(2, 300, (n,), generator=draw).tolist() for n in (21, 9)]
    own = [Sequence(Request(str(i), t, Sampling()), t, [4 * i, 4 * i + 1]) for i, t in enumerate(tokens)]
    a, b = own
    steps = [([Work(a, 0, 17)], True), ([Work(b, 0, 6)], True)]
    return [*steps, *([[Work(a, 17 + i, 18 + i), Work(b, 6 + i, 7 + i)], False] for i in range(3))]


def passes(runner: Runner) -> list[Pass]:
    """The works as passes that want the logits of every piece's last token."""
    made = []
    for step, prefill in works():
        one, ends = runner.passed(step, prefill), 0
        one.last = [(ends := ends + w.stop - w.start) - 1 for w in step]
        made.append(one)
    return made


def run(cell: Cell, rank: int, comm: Comm | None) -> torch.Tensor | None:
    """This rank's part of all passes; rank 0 has the logits [rows, vocab] in host memory."""
    plan, model = cell.plan(), find(cell.folder)
    decoder = build(plan, model.spec, model.source(), rank=rank)
    runner = Runner(decoder, plan)
    if comm:
        comm.shared = None if cell.sockets else comm.shared
        share(decoder, cuts_of(plan, model.spec), rank, comm)
        runner.part = Part(decoder, plan, comm)
    if not cell.replayed:
        runner.part.graphs = None
    found = []
    for one in passes(runner):  # a replayed pass's logits are good until the next
        submitted = runner.part.submit(one)
        found += [runner.part.collect(submitted).cpu()] if rank == 0 else []
    if cell.recorded:
        assert isinstance(runner.part.graphs, Programs) and list(runner.part.graphs.programs) == [2], "not recorded"
    return torch.cat(found) if found else None


class Pool:
    """Processes. `logits` runs a cell on as many of them as it has ranks; on GPUs all cells have the first one's
    mesh, since symmetric memory knows a group by its name, which a second group of a process would have too."""

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self.folder, self.count = folder, 0
        command = [sys.executable, __file__]
        self.members = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(most)
        ]

    def logits(self, cell: Cell) -> torch.Tensor:
        self.count += 1
        size = Degrees(**cell.degrees).size
        store, out = str(self.folder / f"store{self.count}"), str(self.folder / f"out{self.count}")
        for rank, member in enumerate(self.members[:size]):
            member.stdin.write(json.dumps({"cell": asdict(cell), "rank": rank, "store": store, "out": out}) + "\n")
            member.stdin.flush()
        said = [member.stdout.readline().strip() for member in self.members[:size]]
        assert said == ["ok"] * size, said
        return load_file(out)["logits"]

    def close(self) -> None:
        for member in self.members:
            member.stdin.close()
            member.wait(10)


def main() -> None:
    import os

    os.environ.update(LOOPBACK)
    torch.set_num_threads(1)
    comm = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            cell, rank = Cell(**asked["cell"]), asked["rank"]
            comm = comm or Comm(cell.plan().mesh, rank, asked["store"])
            logits = run(cell, rank, comm)
            if cell.device == "cpu":
                comm.close()
                comm = None
            if logits is not None:
                save_file({"logits": logits}, asked["out"])
            said = "ok"
        except Exception as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(said, flush=True)


if __name__ == "__main__":
    main()
