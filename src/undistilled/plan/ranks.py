"""A plan for several processes: which rank computes where, what each holds, and what talking costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadArtefact, UsageError
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from . import cost
from .copies import Copy, choose, read_counts
from .cost import WIDTH, Compute, Dtype, Placed
from .cut import Cuts
from .degrees import Degrees
from .hardware import Device, Link
from .layout import BLOCK, Layout, Layouts, sized
from .mesh import Mesh
from .order import Links, ordered
from .plan import Bytes, DevicePrediction, Kv, Limits, Plan, RankPrediction
from .reads import reads_of
from .stages import Room, balanced, held, layer_bytes

# bytes of a rank that is not the first (no API, no tokenizer), and what process groups add to each: docs/status.md
RANK_RUNTIME = {"cpu": 262_000_000, "cuda": 600_000_000}
GROUPS = {"cpu": 40_000_000, "cuda": 300_000_000}


def mesh_for(
    degrees: Degrees, devices: Sequence[Device], spec: ModelSpec, stored: Mapping[str, str], links: Sequence[Link]
) -> Mesh:
    """The mesh over these devices, stages on the fastest links: a GPU a rank where there are any, else processes."""
    degrees.check(spec.layers)
    inner, used = degrees.tp * degrees.ep, _used(degrees, devices, links)
    stages = [used[at : at + inner] for at in range(0, len(used), inner)]
    mesh = Mesh(
        tp=degrees.tp,
        ep=degrees.ep,
        stages=tuple(balanced(layer_bytes(spec, stored), [_speed(stage) for stage in stages])),
        devices=tuple(d.name for d in used),
        shares=_shares(stages),
        microbatches=degrees.microbatches or degrees.pp,
    )
    return mesh.model_copy(update={"copies": _copies(degrees, Cuts(spec, mesh, stored))}) if degrees.copies else mesh


def _used(degrees: Degrees, devices: Sequence[Device], links: Sequence[Link]) -> list[Device]:
    """The device of each rank. UsageError where there are too few GPUs."""
    gpus = [d for d in devices if d.kind == "cuda"]
    if not gpus:
        return [devices[0]] * degrees.size
    if degrees.size > len(gpus):
        raise UsageError(
            f"{degrees.size} ranks, but {len(gpus)} GPU{'s' * (len(gpus) > 1)}.",
            "Fewer ranks, more machines (--cluster ray), or --device cpu, where ranks are processes.",
        )
    return ordered(gpus, degrees.tp * degrees.ep, degrees.pp, Links(links))


def _speed(stage: list[Device]) -> float:
    return sum(d.ceilings.read_bytes_per_s for d in stage)


def _shares(stages: list[list[Device]]) -> tuple[float, ...]:
    """How much each rank of a stage takes, where their memory differs; of all stages alike."""
    room = [float(sum(d.free_bytes for d in column)) for column in zip(*stages, strict=True)]
    return tuple(share / min(room) for share in room) if max(room) > 1.1 * min(room) else ()


def by_memory(layouts: RankLayouts, layout: Layout, devices: Sequence[Device]) -> Mesh | None:
    """A mesh whose stages fit where those of this layout, shared out by time alone, do not; None where none does."""
    mesh = layouts.mesh
    if layout.fits or mesh.pp == 1 or len(set(mesh.devices)) < mesh.size:
        return None
    known, stored = {d.name: d for d in devices}, {p.row.name: p.row.scheme for p in layouts.loaded}
    used = [known[name] for name in mesh.devices]
    speeds = [_speed(used[at : at + mesh.inner]) for at in range(0, mesh.size, mesh.inner)]
    stages = held(layer_bytes(layouts.spec, stored), speeds, Room(layouts, layout).fits)
    return mesh.model_copy(update={"stages": tuple(stages)}) if stages else None


def _copies(degrees: Degrees, cuts: Cuts) -> tuple[Copy, ...]:
    counts = read_counts(Path(degrees.counts or ""), cuts.spec)
    if cuts.groups < 2:
        raise UsageError("The ranks share every expert by width: there is nobody to copy one to.", "Give --ep.")
    return choose(counts, [held[0] for held in cuts.holders(cuts.spec.layers - 1)], cuts.groups, degrees.copies)


def placed_of(plan: Plan, spec: ModelSpec) -> list[Placed]:
    """The rows of a plan that are loaded, with their weights."""
    known = {w.name: w for w in weights(spec)}
    return [Placed(row, known[row.name]) for row in plan.rows if row.store != "unloaded"]


def layouts_of(plan: Plan, spec: ModelSpec, links: Sequence[Link] = ()) -> Layouts:
    """What lays a plan's rows out over its devices, or its ranks. BadArtefact where ranks use others than these."""
    free = {name: device.available for name, device in plan.predicted.devices.items()}
    loaded, form = placed_of(plan, spec), dict[str, Any](scheme=plan.scheme, compute=plan.compute_dtype)
    form |= {"cache": plan.kv.dtype, "block": plan.kv.block_size}
    if plan.mesh is None:
        return Layouts(spec, loaded, free, **form)
    if missing := set(plan.mesh.devices) - free.keys():
        raise BadArtefact(f"The plan's mesh uses {', '.join(sorted(missing))}, which is no device of the plan.")
    return RankLayouts(spec, loaded, free, mesh=plan.mesh, links=links, **form)


def cuts_of(plan: Plan, spec: ModelSpec) -> Cuts:
    """What each rank of a plan holds."""
    assert plan.mesh is not None
    stored = {row.name: row.scheme for row in plan.rows if row.store != "unloaded"}
    return Cuts(spec, plan.mesh, stored, plan.compute_dtype)


class RankLayouts(Layouts):
    """Layouts over the ranks of a mesh. `links`: of the machine."""

    def __init__(
        self,
        spec: ModelSpec,
        loaded: list[Placed],
        free: Mapping[str, int],
        *,
        mesh: Mesh,
        scheme: str,
        compute: Compute,
        cache: Dtype,
        links: Sequence[Link] = (),
        block: int = BLOCK,
    ) -> None:
        super().__init__(spec, loaded, free, scheme=scheme, compute=compute, cache=cache, block=block)
        self.mesh, self.links = mesh, Links(links)
        self.kind = "cuda" if mesh.devices[0] != "cpu" else "cpu"
        self.cuts = Cuts(spec, mesh, {p.row.name: p.row.scheme for p in loaded}, compute)
        self.reads = reads_of(self.cuts, loaded)
        self._working: dict[tuple[ModelSpec, Limits], int] = {}

    def at(self, context: int, batch: int) -> Layout:
        return self.over(*sized(self.spec, context, batch, self.block, self.cache, self.kind))

    def over(self, limits: Limits, kv: Kv) -> Layout:
        """With a cache and limits of whatever size."""
        ranks = [self._rank(rank, limits, kv) for rank in range(self.mesh.size)]
        placed = [self._home(p, self.home(p.weight)) for p in self.loaded]
        devices = {}
        for name in dict.fromkeys(self.mesh.devices):
            found = _sum([rank.bytes for rank in ranks if rank.device == name])
            devices[name] = DevicePrediction(
                bytes=found, available=self.free[name], fits=found.total <= self.free[name]
            )
        return Layout(limits, kv, placed, devices, ranks)

    def home(self, weight: Weight) -> str:
        """The stage whose ranks hold a weight: the first of them."""
        mesh = self.mesh
        return f"stage:{next(s for s in range(mesh.pp) if self.cuts.held(weight, s * mesh.inner))}"

    def _rank(self, rank: int, limits: Limits, kv: Kv) -> RankPrediction:
        device = self.mesh.devices[rank]
        kind = device.split(":")[0]
        cache = kv.blocks * kv.block_size * self.cuts.cache_values(rank) * WIDTH[kv.dtype]
        working = max(self.work(rank, limits), cost.load_bytes(self.loaded) - cache)
        constant = GROUPS[kind] + (cost.runtime(device, self.loaded) if rank == 0 else RANK_RUNTIME[kind])
        held = self.reads[rank].held
        total = held + cache + working + constant
        found = Bytes(weights=held, kv=cache, activations=working, runtime=constant, total=total)
        return RankPrediction(device=device, bytes=found, collective_s=self.talk(rank, limits.batch))

    def work(self, rank: int, limits: Limits) -> int:
        """Bytes that a rank's passes work in."""
        spec = self.cuts.spec_of(rank)
        narrow = replace(spec, intermediate=-(-spec.intermediate // self.mesh.inner))
        last = self.mesh.stage(rank) == self.mesh.pp - 1
        key = narrow if last else replace(narrow, vocab=1), limits
        if key not in self._working:  # ranks are often alike
            self._working[key] = self.working(*key)
        return self._working[key]

    def said(self, rows: int) -> list[str]:
        """What a step of so many rows talks about, over which links, for people."""
        mesh, found, message = self.mesh, [], rows * self.spec.hidden * self._width
        if mesh.inner > 1:
            pairs = {(mesh.devices[a], mesh.devices[b]) for a in range(mesh.size) for b in mesh.peers(a) if a < b}
            seconds, a, b = max((self.links.sum_seconds(*pair, message * (mesh.inner - 1)), *pair) for pair in pairs)
            sums = max(map(self._sums, range(mesh.size)))
            found.append(
                f"A step has {sums} sums of {message / 1e3:.1f} KB over {mesh.inner} ranks, {seconds * 1e6:.0f} µs "
                f"each by the slowest link of a stage, {a} to {b} ({self.links.source(a, b)})."
            )
        if mesh.pp > 1:
            pairs = set(zip(mesh.devices, mesh.devices[mesh.inner :], strict=False))
            seconds, a, b = max((self.links.message_seconds(*pair, message), *pair) for pair in pairs)
            found.append(
                f"A stage gets {message / 1e3:.1f} KB a step from the one before, in at most {seconds * 1e6:.0f} µs, "
                f"{a} to {b} ({self.links.source(a, b)})."
            )
        return found

    @property
    def _width(self) -> int:
        """Bytes of a value that ranks exchange."""
        return WIDTH["float32" if self.kind == "cpu" else self.compute]

    def _sums(self, rank: int) -> int:
        """Of a step: two a layer, and the embedding's."""
        return 2 * len(self.mesh.layers(rank)) + (self.mesh.stage(rank) == 0)

    def talk(self, rank: int, rows: int) -> float:
        """Seconds of collectives and messages of one step over `rows` rows, as the links allow."""
        mesh, inner = self.mesh, self.mesh.inner
        message, seconds = rows * self.spec.hidden * self._width, 0.0
        if inner > 1:
            ends = [(mesh.devices[rank], mesh.devices[peer]) for peer in mesh.peers(rank) if peer != rank]
            reduce = max(self.links.sum_seconds(*pair, message * (inner - 1)) for pair in ends)
            seconds += reduce * self._sums(rank)
            if mesh.stage(rank) == mesh.pp - 1:
                others = rows * self.spec.vocab * self._width * (inner - 1) / inner
                seconds += max(self.links.gather_seconds(*pair, others) for pair in ends)
        if mesh.stage(rank) > 0:
            seconds += self.links.message_seconds(mesh.devices[rank - inner], mesh.devices[rank], message)
        return seconds


def _sum(each: list[Bytes]) -> Bytes:
    return Bytes(**{name: sum(getattr(one, name) for one in each) for name in Bytes.model_fields})
