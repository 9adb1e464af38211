"""Which devices sit beside each other in a mesh: a stage's on the fastest links, so that pipelines cross the slow ones.

A stage's ranks sum twice a layer; stages hand over once.
"""

from __future__ import annotations

from collections.abc import Sequence

from .hardware import Device, Link, Timed

# a message between two processes where no link is known: seconds until it is there, and bytes a second
ESTIMATED = {"cpu": (150e-6, 1.5e9), "cuda": (20e-6, 20e9)}
MESSAGE = 1 << 20  # bytes by which links are compared: those of decoding are smaller, those of prompts larger
SEEDS = 64  # devices from which a stage is tried


class Links:
    """How long messages take between two devices, by name; in either direction."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._known = {frozenset((link.a, link.b)): link for link in links}

    def source(self, a: str, b: str) -> str:
        """Where figures of two devices come from."""
        link = self._known.get(frozenset((a, b)))
        return f"{link.kind}, {link.source}" if link else "no link known, assumed"

    def between(self, a: str, b: str) -> tuple[float, float]:
        """(latency in seconds, bytes a second)."""
        link = self._known.get(frozenset((a, b)))
        return (link.latency_s, link.bytes_per_s) if link else ESTIMATED[a.split(":")[0]]

    def sum_seconds(self, a: str, b: str, nbytes: float) -> float:
        """Of a sum of so many bytes that the other end has: as measured at sizes around it, or by the link's rate."""
        link = self._known.get(frozenset((a, b)))
        return _between(link.sums, nbytes) if link and link.sums else self.message_seconds(a, b, nbytes)

    def gather_seconds(self, a: str, b: str, nbytes: float) -> float:
        """Of a gathering of so many bytes that the other end has."""
        link = self._known.get(frozenset((a, b)))
        return _between(link.gathers, 2 * nbytes) if link and link.gathers else self.message_seconds(a, b, nbytes)

    def message_seconds(self, a: str, b: str, nbytes: float) -> float:
        """Of so many bytes from one to the other, by the link's latency and rate."""
        latency, rate = self.between(a, b)
        return latency + nbytes / rate

    def seconds(self, a: Device, b: Device) -> float:
        return self.message_seconds(a.name, b.name, MESSAGE)


def _between(points: Sequence[Timed], nbytes: float) -> float:
    """Seconds at a size, on the lines from each point to the next larger one; below the least, its own."""
    points = sorted({p.bytes: p for p in points}.values(), key=lambda p: p.bytes)
    if nbytes <= points[0].bytes or len(points) == 1:
        return points[0].seconds * max(1.0, nbytes / points[0].bytes)
    after = next((i for i, p in enumerate(points) if p.bytes >= nbytes), len(points) - 1)
    low, high = points[after - 1], points[after]
    slope = max(0.0, high.seconds - low.seconds) / (high.bytes - low.bytes)  # less for more bytes is noise
    return low.seconds + slope * (nbytes - low.bytes)


def ordered(devices: Sequence[Device], inner: int, stages: int, links: Links) -> list[Device]:
    """inner * stages of the devices, each stage's side by side; in the order given where links make no difference."""
    place = {device.name: i for i, device in enumerate(devices)}
    left, groups = list(devices), []
    for _ in range(stages):
        tried = [_grown(seed, left, inner, links) for seed in left[:SEEDS]]
        group = min(tried, key=lambda g: (_slowest(g, links), [place[d.name] for d in g]))
        groups.append(group)
        left = [d for d in left if d not in group]
    return [device for group in _chained(groups, links) for device in group]


def _grown(seed: Device, among: Sequence[Device], size: int, links: Links) -> list[Device]:
    """The seed and those that talk fastest with all that are there already; in the order of `among`."""
    group = [seed]
    while len(group) < size:
        others = (d for d in among if d not in group)
        group.append(min(others, key=lambda d: max(links.seconds(d, g) for g in group)))
    return [d for d in among if d in group]


def _slowest(group: Sequence[Device], links: Links) -> float:
    return max((links.seconds(a, b) for i, a in enumerate(group) for b in group[:i]), default=0.0)


def _chained(groups: list[list[Device]], links: Links) -> list[list[Device]]:
    """Stages one after another, each followed by the one that it hands over to fastest."""
    chain, left = groups[:1], groups[1:]
    while left:
        last = chain[-1]
        following = min(left, key=lambda g: max(links.seconds(a, b) for a, b in zip(last, g, strict=True)))
        chain.append(following)
        left.remove(following)
    return chain
