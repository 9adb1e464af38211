"""Where ranks run: what starts, watches and ends their processes, and where they find the driver.

Kinds of places are rows of a table; the driver (crew.py) and a rank (generate/rank.py) know no more than this.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import zmq

from ..errors import UsageError
from ..plan.hardware import Machine, load_machine
from ..plan.plan import Plan
from .cluster import merged

# in an exit code's place, where whoever could have told it is gone: with its host, or alone
LOST, UNTOLD = 1 << 16, 1 << 17


class Process(Protocol):
    """A rank's process as the driver sees it. `where`: its host, for errors; "" for the driver's own."""

    where: str

    def poll(self) -> int | None:
        """Its exit code, minus a signal's number, LOST or UNTOLD; None while it runs."""

    def kill(self) -> None: ...

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long."""


class Place(Protocol):
    """One run's places. size: its ranks; device: the driver's own; store: where process groups meet
    (comm.rendezvous); network: what the driver's environment needs for their sockets."""

    size: int
    device: str
    store: str
    hosts: int
    threads: int  # of the driver
    network: dict[str, str]

    def bind(self, passes: zmq.Socket[bytes], reports: zmq.Socket[bytes]) -> None:
        """Bind the driver's sockets to where ranks will connect."""

    def start(self, rank: int, told: dict[str, Any]) -> Process:
        """Start a rank with what it is `told` beside what only the place knows."""

    def close(self) -> None:
        """Give up what is left, once all processes have ended."""


PLACES = {"local": "local", "ray": "ray_nodes"}  # --cluster, but for this machine alone -> the module


def _module(kind: str) -> Any:
    if kind not in PLACES:
        known = ", ".join(name for name in PLACES if name != "local")
        raise UsageError(f"--cluster {kind!r} is not known.", f"Known: {known}.")
    return import_module(f".{PLACES[kind]}", __package__)


def place_for(kind: str, plan: Plan, model: str) -> Place:
    """The places of a plan's ranks. UsageError where there is no such kind of cluster, or none is running."""
    made: Place = _module(kind).place(plan, model)
    return made


def machine_of(kind: str, named: str = "this") -> Machine:
    """All devices that such a place offers, as one machine to plan for. Or those that it will: of a machine that is
    `named` as in `load_machine`, of a cluster one for each node, with commas between."""
    module = _module(kind)
    if kind != "local" and named != "this":
        return merged([load_machine(each.strip()) for each in named.split(",")])
    found: Machine = load_machine(named) if named != "this" else module.machine()
    return found
