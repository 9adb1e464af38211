"""Messages between stages, seen at both of their ends: what of their time was hidden behind computing.

`Comm` tells each send and receive as an event ("comm"); `Moves` keeps those that hand over.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..events import Event
from ..plan.mesh import Mesh
from .comm import HANDING, RECEIVING, RETURNED, RETURNING
from .messages import Handed

KEPT = 100_000  # moves; a run that is watched is short


class Moves:
    """A consumer of events that keeps this process's sends and receives until they are taken."""

    def __init__(self) -> None:
        self._kept: deque[Handed] = deque(maxlen=KEPT)

    def __call__(self, event: Event) -> None:
        f = event.fields
        if event.name == "comm" and f["operation"] in (HANDING, RECEIVING, RETURNING, RETURNED):
            self._kept.append(Handed(f["operation"], event.seconds - f["seconds"], event.seconds, f["bytes"]))

    def take(self) -> list[Handed]:
        """What was kept; another thread may be adding to it."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


@dataclass(frozen=True)
class Overlap:
    """Seconds that messages between stages were on their way, and in how many of them the receiver waited."""

    seconds: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """The share that was hidden behind computing; 1 where there were no messages."""
        return 1 - self.exposed / self.seconds if self.seconds else 1.0


def overlap(mesh: Mesh, moves: Mapping[int, Sequence[Handed]]) -> Overlap:
    """Of what every rank sent and received, by one clock, since a moment when nothing was on its way."""
    pairs = [pair for route in _routes(mesh) for pair in _matched(moves, *route)]
    typical: dict[int, list[float]] = defaultdict(list)
    for sent, got in pairs:
        if got.began <= sent.began:  # it was waited for from the start: this is how long one takes
            typical[got.nbytes].append(got.ended - sent.began)
    seconds = exposed = 0.0
    for sent, got in pairs:
        took = got.ended - sent.began
        seconds += min(took, median(typical[got.nbytes])) if typical[got.nbytes] else took
        exposed += min(max(0.0, got.ended - max(got.began, sent.began)), took)
    return Overlap(max(seconds, exposed), exposed)


def _routes(mesh: Mesh) -> Iterator[tuple[int, str, int, str]]:
    """(sender, what it does, receiver, what it does)."""
    for rank in range(mesh.size - mesh.inner):
        yield rank, HANDING, rank + mesh.inner, RECEIVING
    if mesh.pp > 1:
        yield mesh.size - mesh.inner, RETURNING, 0, RETURNED


def _matched(
    moves: Mapping[int, Sequence[Handed]], sender: int, sends: str, receiver: int, receives: str
) -> Iterator[tuple[Handed, Handed]]:
    """Messages of one route at both ends: they arrive in the order in which they were sent."""
    ends = ((sender, sends), (receiver, receives))
    sent, got = ([m for m in moves.get(rank, ()) if m.operation == what] for rank, what in ends)
    return zip(sent, got, strict=False)
