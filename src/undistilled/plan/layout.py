"""Which device keeps which weight, and what that takes, for any context and batch.

One device if it holds everything. Else GPUs take consecutive layers, and the routed experts that do not
fit beside them live and run on the CPU, where a token reads only the few that it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from ..model.spec import ModelSpec
from . import cost
from .cost import WIDTH, Compute, Dtype, Placed
from .plan import ContextPrediction, DevicePrediction, Kv, Limits, RankPrediction

BLOCK = 16  # tokens in a cache block
CHUNK = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Layout:
    """Where everything goes for one context and batch, and what that takes on the devices that keep something."""

    limits: Limits
    kv: Kv
    placed: list[Placed]
    devices: dict[str, DevicePrediction]
    ranks: list[RankPrediction] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return all(d.fits for d in self.devices.values())

    @property
    def only_predicted(self) -> bool:
        """Whether it is of one process over several devices, which no run takes."""
        return len(self.devices) > 1 and not self.ranks

    @property
    def prediction(self) -> ContextPrediction:
        return ContextPrediction(
            context=self.limits.context,
            kv_bytes={name: d.bytes.kv for name, d in self.devices.items()},
            total_bytes={name: d.bytes.total for name, d in self.devices.items()},
            fits=self.fits,
        )


class Layouts:
    """Lays `loaded` out over devices; where its rows say that they are does not count.

    `free`: bytes of each device, GPUs first.
    """

    def __init__(
        self,
        spec: ModelSpec,
        loaded: list[Placed],
        free: Mapping[str, int],
        *,
        scheme: str,
        compute: Compute,
        cache: Dtype,
        block: int = BLOCK,
    ) -> None:
        self.spec, self.loaded, self.free = spec, loaded, free
        self.scheme, self.compute, self.cache, self.block = scheme, compute, cache, block
        self.kind = "cuda" if any(name != "cpu" for name in free) else "cpu"
        self._homed: dict[tuple[str, str], Placed] = {}

    def at(self, context: int, batch: int) -> Layout:
        limits, kv = sized(self.spec, context, batch, self.block, self.cache, self.kind)
        working = self.working(self.spec, limits)
        cache = kv.blocks * kv.block_size * kv.bytes_per_token
        homes = place(self.loaded, self.free, cache, working)
        placed = [self._home(p, homes[p.weight.name]) for p in self.loaded]
        devices = {}
        for name, available in self.free.items():
            if name in homes.values():
                found = cost.device_bytes(name, placed, cache, working)
                devices[name] = DevicePrediction(bytes=found, available=available, fits=found.total <= available)
        return Layout(limits, kv, placed, devices)

    def working(self, spec: ModelSpec, limits: Limits) -> int:
        """Bytes of a pass's activations, of this model or of a rank's share of it."""
        return cost.activation_bytes(
            spec,
            chunk=limits.chunk,
            batch=limits.batch,
            context=limits.context,
            compute=self.compute,
            kind=self.kind,
            scheme=self.scheme,
        )

    def _home(self, p: Placed, home: str) -> Placed:
        found = self._homed.get((p.weight.name, home))
        if found is None:
            row = p.row.model_copy(update={"store": home, "compute": home})
            found = self._homed[p.weight.name, home] = Placed(row, p.weight)
        return found


def sized(spec: ModelSpec, context: int, batch: int, block: int, cache: Dtype, kind: str) -> tuple[Limits, Kv]:
    """What so many requests of so many tokens ask for."""
    blocks = -(-context // block)
    kv = Kv(
        dtype=cache, block_size=block, blocks=batch * blocks, bytes_per_token=spec.kv_bytes_per_token(WIDTH[cache])
    )
    return Limits(context=context, batch=batch, chunk=min(CHUNK[kind], blocks * block)), kv


def place(loaded: list[Placed], free: Mapping[str, int], cache: int, working: int) -> dict[str, str]:
    """Weight name -> device. `cache`: bytes of all layers; `working`: bytes that a pass needs on each device."""
    held = {p.weight.name: p.row.nbytes for p in loaded}
    layers = [p.weight.name for p in loaded if p.weight.role == "attention.o" and not p.weight.mtp]
    for name in layers:  # a layer's cache is where its attention is
        held[name] += -(-cache // len(layers))
    devices, gpus = list(free), [name for name in free if name != "cpu"]
    room = {name: max(free[name] - cost.runtime(name, loaded) - working, 0) for name in devices}
    for device in gpus or devices:
        if sum(held.values()) <= room[device] or len(devices) == 1:
            return dict.fromkeys(held, device)
    stage = _stages(loaded, held, {g: room[g] for g in gpus})
    experts = [p.weight.name for p in loaded if p.weight.experts]
    homes = stage | dict.fromkeys(experts, devices[-1])
    for name in held.keys() - set(experts):
        room[stage[name]] -= held[name]
    for name in experts:
        if held[name] <= room[stage[name]]:
            homes[name] = stage[name]
            room[stage[name]] -= held[name]
    return homes


def _stages(loaded: list[Placed], held: dict[str, int], room: dict[str, int]) -> dict[str, str]:
    """Weight name -> GPU: layers in order, each GPU with the share of all bytes that it has of all room.

    Experts count also where not all of them fit, so that no GPU has room left over.
    """
    stage: dict[str, str] = {}
    gpus, share = list(room), sum(held.values()) / max(sum(room.values()), 1)
    filled, at, until = 0, 0, share * room[gpus[0]]
    for _, layer in groupby(loaded, key=lambda p: p.weight.layer):
        names = [p.weight.name for p in layer]
        each = sum(held[name] for name in names)
        while at + 1 < len(gpus) and filled + each / 2 > until:
            at += 1
            until += share * room[gpus[at]]
        stage |= dict.fromkeys(names, gpus[at])
        filled += each
    return stage
