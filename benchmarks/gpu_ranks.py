"""R1-wide layers (FP8 blocks, random weights) on two GPUs beside one: tensor parallel, and a pipeline.

    PYTHONPATH=src python benchmarks/gpu_ranks.py CONFIG.json [--json OUT] [--only tp pp]

tp: milliseconds of a decode step at batch 1 and 32 behind 4,096 tokens and of a prefill of 4,096, on one GPU and cut
over two; and what the collectives of a step take by themselves, beside what the plan says from links measured in the
same run.
pp: eight parts of a batch (prompts of 512 tokens; rows of a decode batch of 32) through two stages with 1, 4 and 8 of
them in the pipeline together. Idle is the share of the two GPUs' time in which they do not compute, beside
(p - 1) / (m + p - 1), which is what stages of equal time leave.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from gpu_slice import randomise
from undistilled.generate.runner import Runner
from undistilled.load.build import DTYPE, Memory
from undistilled.model.decoder import Decoder
from undistilled.model.spec import spec_from_config
from undistilled.parallel.comm import Comm
from undistilled.parallel.links import measure_links
from undistilled.parallel.local import LOOPBACK
from undistilled.parallel.messages import Pass
from undistilled.parallel.share import share
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import Machine, load_machine
from undistilled.plan.plan import Plan, read_plan
from undistilled.plan.ranks import cuts_of, layouts_of
from undistilled.plan.solve import Ask, solve
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work

PROMPT, ROWS, PARTS = 4096, 32, 8
STEPS, ROUNDS = 40, 3
# one dense and so many MoE layers, and how many of all are the first stage's: five MoE layers each, and the dense one
# against the head
CASES: dict[str, dict] = {
    "tp1": {"degrees": {}, "moe": 5},
    "tp2": {"degrees": {"tp": 2}, "moe": 5},
    "pp2": {"degrees": {"pp": 2}, "moe": 10, "first": 6},
}


def config_of(path: Path, moe: int) -> dict:
    """R1's config with one dense and so many MoE layers, and no MTP layer."""
    shape = {"num_hidden_layers": 1 + moe, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    return json.loads(path.read_text()) | shape


def plan_of(path: Path, case: str, machine: Machine) -> Plan:
    """A case's plan, with its stages as `CASES` has them."""
    shape = CASES[case]
    config = config_of(path, shape["moe"])
    ask = replace(Ask("fp8_block", PROMPT + 64, ROWS), degrees=Degrees(**shape["degrees"]))
    plan = solve("r1-slice", config, spec_from_config(config), machine, ask)
    if "first" not in shape:
        assert plan.mesh or list(plan.predicted.devices) == ["cuda:0"], "the slice needs more than one GPU's memory"
        return plan
    stages = ((0, shape["first"]), (shape["first"], 1 + shape["moe"]))
    return plan.model_copy(update={"mesh": plan.mesh.model_copy(update={"stages": stages})})


class Member:
    """One rank of a case."""

    def __init__(self, config: Path, case: str, rank: int, folder: Path) -> None:
        self.spec, self.rank = spec_from_config(config_of(config, CASES[case]["moe"])), rank
        self.plan = plan = read_plan(folder / "plan.json")
        mesh = plan.mesh
        torch.cuda.set_device(rank)
        memory = Memory(plan, self.spec, rank)
        seen = memory.cuts.spec_of(rank) if mesh else self.spec
        layers = mesh.layers(rank) if mesh else None
        with torch.inference_mode():
            self.decoder = Decoder(memory, seen, DTYPE[plan.activation_dtype], layers=layers)
            for name, stored in memory.held.items():  # what ranks repeat is the same on each
                torch.manual_seed(zlib.crc32(name.encode()))
                randomise({name: stored})
        self.comm = Comm(mesh, rank, str(folder / "store")) if mesh else None
        if self.comm:
            share(self.decoder, cuts_of(plan, self.spec), rank, self.comm)
        self.runner = Runner(self.decoder, plan, comm=self.comm)
        self.part = self.runner.part
        own = plan.kv.blocks // ROWS
        self.blocks = [list(range(i * own, (i + 1) * own)) for i in range(ROWS)]
        self.draw = torch.Generator().manual_seed(1)

    def tokens(self, count: int) -> list[int]:
        return torch.randint(0, self.spec.vocab, (count,), generator=self.draw).tolist()

    def passed(self, pieces: list[tuple[int, int, int]], prefill: bool) -> Pass:
        """Random tokens [start, stop) of sequences, as (sequence, start, stop); their last logits are wanted."""
        works, ends = [], 0
        for at, start, stop in pieces:
            tokens = [0] * start + self.tokens(stop - start)
            works.append(Work(Sequence(Request(str(at), tokens, Sampling()), tokens, self.blocks[at]), start, stop))
        made = self.runner.passed(works, prefill)
        made.last = [(ends := ends + stop - start) - 1 for _, start, stop in pieces]
        return made

    def rows(self, sequences: range, at: int = PROMPT) -> Pass:
        return self.passed([(i, at, at + 1) for i in sequences], False)

    def collected(self, handle) -> None:
        if self.rank == 0:
            self.part.collect(handle)

    def together(self) -> None:
        """Nothing before here is still on its way, on any rank."""
        torch.cuda.synchronize()
        if self.comm:
            self.comm.barrier()


def each(member: Member, one: Callable[[], Pass], count: int) -> list[float]:
    """Milliseconds of passes one after another, as rank 0 sees them, the first three left out."""
    taken = []
    for _ in range(count + 3):
        work = one()
        member.together()
        began = perf_counter()
        member.collected(member.part.submit(work))
        torch.cuda.synchronize()
        taken.append((perf_counter() - began) * 1e3)
    return [median(taken[3:]), min(taken[3:]), max(taken[3:])]


def steps(member: Member, rows: int) -> list[float]:
    """Milliseconds of a decode step of so many rows: the median of each round of steps in a row."""
    member.together()
    for _ in range(4):
        member.collected(member.part.submit(member.rows(range(rows))))
    found = []
    for _ in range(ROUNDS):
        works = [member.rows(range(rows)) for _ in range(STEPS)]
        member.together()
        began = perf_counter()
        for work in works:
            member.collected(member.part.submit(work))
            torch.cuda.synchronize()
        found.append((perf_counter() - began) / STEPS * 1e3)
    return [median(found), min(found), max(found)]


def tensor(member: Member) -> dict:
    """A case of tensor parallelism."""
    found = {
        "prefill_ms": each(member, lambda: member.passed([(0, 0, PROMPT)], True), 6),
        "decode_1_ms": steps(member, 1),
        f"decode_{ROWS}_ms": steps(member, ROWS),
    }
    if member.comm:
        found["collectives_ms"] = {rows: collectives(member, rows) for rows in (1, ROWS)}
    return found


def collectives(member: Member, rows: int) -> list[float]:
    """Milliseconds of a decode step's sums and of its logits' gathering, by themselves in one graph."""
    comm, spec = member.comm, member.spec
    x = torch.zeros(rows, spec.hidden, device=comm.device, dtype=member.decoder.dtype)
    y = torch.zeros(rows, spec.vocab // 2, device=comm.device, dtype=x.dtype)

    def step() -> None:
        for _ in range(1 + 2 * spec.layers):
            comm.all_reduce(x)
        comm.all_gather(y, [y.shape[1]] * 2)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(STEPS):
            step()
    taken = []
    for _ in range(5):
        member.together()
        began = perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        taken.append((perf_counter() - began) / STEPS * 1e3)
    return [median(taken[1:]), min(taken[1:]), max(taken[1:])]


def pipeline(member: Member, works: Callable[[], list[Pass]], together: int) -> dict:
    """Parts in groups of `together`: a group is in the pipeline at once, and drained before the next."""
    walls, busy = [], []
    for round_ in range(ROUNDS + 1):
        passes = works()
        member.together()
        began, before = perf_counter(), member.part.busy
        for at in range(0, len(passes), together):
            handles = deque(member.part.submit(work) for work in passes[at : at + together])
            while handles:
                member.collected(handles.popleft())
        torch.cuda.synchronize()
        if round_:  # the first one compiles
            walls.append(perf_counter() - began)
            busy.append(member.part.busy - before)
    return {"wall_s": walls, "busy_s": busy}


def flowing(member: Member, together: int) -> float:
    """Decode tokens a second of `ROWS` sequences in `together` parts, each submitted again as it comes back."""
    size, steps_ = ROWS // together, 24
    parts = [range(i * size, (i + 1) * size) for i in range(together)]
    works = [[member.rows(part, PROMPT + step % 32) for part in parts] for step in range(steps_)]
    member.together()
    began, handles = perf_counter(), deque()
    for step in works:
        for work in step:
            if len(handles) == together:
                member.collected(handles.popleft())
            handles.append(member.part.submit(work))
    while handles:
        member.collected(handles.popleft())
    torch.cuda.synchronize()
    return ROWS * steps_ / (perf_counter() - began)


def staged(member: Member) -> dict:
    """The case of a pipeline: what `pipeline` and `flowing` measure, by what passes and how many are in it at once."""
    found: dict[str, object] = {}
    for count in (1, 4, 8):

        def prompts() -> list[Pass]:
            return [member.passed([(i, 0, PROMPT // PARTS)], True) for i in range(PARTS)]

        def rows(size: int = ROWS // count) -> list[Pass]:
            starts = list(range(0, ROWS, size)) * (PARTS * size // ROWS)
            return [member.rows(range(at, at + size)) for at in starts]

        found[f"prompts {count}"] = pipeline(member, prompts, count)
        found[f"rows {count}"] = pipeline(member, rows, count)
        flowing(member, count)
        found[f"flow {count}"] = [flowing(member, count) for _ in range(ROUNDS)]
    return found


def measured(member: Member, case: str) -> dict:
    with torch.inference_mode():
        found = tensor(member) if case.startswith("tp") else staged(member)
    found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(member.part.device)
    ranks = member.plan.predicted.ranks
    found["planned_bytes"] = (
        ranks[member.rank].bytes if ranks else member.plan.predicted.devices["cuda:0"].bytes
    ).model_dump()
    return found


def run(config: Path, case: str, machine: Machine) -> list[dict]:
    """What each rank of a case measured."""
    size = Degrees(**CASES[case]["degrees"]).size
    with tempfile.TemporaryDirectory() as folder:
        plan_of(config, case, machine).write(Path(folder) / "plan.json")
        command = [sys.executable, __file__, str(config), "--case", case, "--folder", folder]
        members = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | LOOPBACK
            )
            for rank in range(size)
        ]
        said = [member.communicate()[0] for member in members]
    return [json.loads(one.splitlines()[-1]) if one.strip() else {} for one in said]


def idle(found: list[dict], what: str, together: int) -> dict:
    """Of the case of stages, from what its ranks measured. `free`: the share of the wall's time that the stages would
    take, one pass behind another, if messages and launches were free."""
    walls, busy = ([one[f"{what} {together}"][of] for one in found] for of in ("wall_s", "busy_s"))
    wall, stages = median(walls[0]), [median(each) for each in busy]
    each = [stage / PARTS for stage in stages]
    free = PARTS / together * (sum(each) + (together - 1) * max(each))
    shares = [1 - sum(b) / len(b) / w for w, *b in zip(walls[0], *busy, strict=True)]
    return {
        "wall_ms": [1e3 * wall, 1e3 * min(walls[0]), 1e3 * max(walls[0])],
        "busy_ms": [1e3 * stage for stage in stages],
        "idle": [median(shares), min(shares), max(shares)],
        "equal_stages": (len(found) - 1) / (together + len(found) - 1),
        "free": free / wall,
    }


def predicted(config: Path, machine: Machine) -> dict[int, float]:
    """Milliseconds of a step's collectives by the plan, from the machine's links, by rows."""
    plan = plan_of(config, "tp2", machine)
    layouts = layouts_of(plan, spec_from_config(config_of(config, CASES["tp2"]["moe"])), machine.links)
    return {rows: layouts.talk(0, rows) * 1e3 for rows in (1, ROWS)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=["tp", "pp"])
    parser.add_argument("--case")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(Member(args.config, args.case, args.rank, args.folder), args.case)))
        return
    machine = load_machine("this")
    machine = machine.model_copy(update={"links": measure_links(machine, lambda said: print(said, file=sys.stderr))})
    report: dict = {"gpu": torch.cuda.get_device_name(), "links": [link.model_dump() for link in machine.links]}
    report["predicted_collectives_ms"] = predicted(args.config, machine)
    for case in CASES:
        if case[:2] in args.only:
            report[case] = run(args.config, case, machine)
            if case.startswith("pp") and all(report[case]):
                pairs = [(what, count) for what in ("prompts", "rows") for count in (1, 4, 8)]
                report[f"{case} idle"] = {f"{w} {n}": idle(report[case], w, n) for w, n in pairs}
            print(case, json.dumps(report[case])[:3000], json.dumps(report.get(f"{case} idle")), flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
