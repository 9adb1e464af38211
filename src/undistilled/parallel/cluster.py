"""Several machines as one to plan for."""

from __future__ import annotations

from itertools import combinations

from ..plan.hardware import Device, Link, Machine

NETWORK = 50e-6, 3e9  # seconds until a message is there, bytes a second: a cluster's, where nobody measured it


def merged(machines: list[Machine]) -> Machine:
    """Their GPUs numbered through, their main memory as one, and estimated links between them."""
    if len(machines) == 1:
        return machines[0]
    gpus: list[Device] = []
    links: list[Link] = []
    hosts: list[list[str]] = []
    for machine in machines:
        own = [d for d in machine.devices if d.kind == "cuda"]
        names = {d.name: f"cuda:{len(gpus) + i}" for i, d in enumerate(own)}
        gpus += [d.model_copy(update={"name": names[d.name]}) for d in own]
        hosts.append(list(names.values()))
        links += [
            link.model_copy(update={"a": names[link.a], "b": names[link.b]})
            for link in machine.links
            if {link.a, link.b} <= names.keys()
        ]
    for ours, theirs in combinations(hosts, 2):
        links += [_network(a, b) for a in ours for b in theirs]
    first = machines[0]
    devices = (*(d for d in [_memory(machines)] if d), *gpus)
    return first.model_copy(
        update={"name": f"{first.name} and {len(machines) - 1} more", "devices": devices, "links": tuple(links)}
    )


def _network(a: str, b: str) -> Link:
    return Link(a=a, b=b, latency_s=NETWORK[0], bytes_per_s=NETWORK[1], kind="network", source="estimated")


def _memory(machines: list[Machine]) -> Device | None:
    """The first machine's CPU with the memory and cores of all."""
    cpus = [d for machine in machines for d in machine.devices if d.kind == "cpu"]
    summed = ("memory_bytes", "free_bytes", "cores")
    return cpus[0].model_copy(update={key: sum(getattr(d, key) for d in cpus) for key in summed}) if cpus else None
