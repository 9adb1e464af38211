"""Which cores ranks of one machine have: where memory has several nodes (sockets, mostly), each rank those of one, so
that it computes beside its weights and its cache; what it allocates then lies there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress

TASKS = "/proc/self/task"  # a folder for each thread


def shared_out(ranks: int, nodes: Sequence[Collection[int]]) -> list[tuple[int, ...]]:
    """The cores of each rank, of all nodes' cores; none where there is nothing to part, or some rank would have less
    than the others. Ranks of a node share its cores: which of them are one core twice is not asked."""
    count = len(nodes)
    if count < 2 or ranks < 2 or (ranks % count and count % ranks):
        return []
    each, sharing = max(1, count // ranks), max(1, ranks // count)
    found = [tuple(sorted(set().union(*nodes[at : at + each]))) for at in range(0, count, each) for _ in range(sharing)]
    equal = sum(map(len, nodes)) // ranks
    return found if min(map(len, found)) // sharing >= equal else []


def confine(cores: Collection[int]) -> frozenset[int]:
    """Has the threads of this process, and those to come, run on these cores; returns those that this thread might run
    on before. Nothing changes where there are none, or where the system has threads run where it likes."""
    if not hasattr(os, "sched_setaffinity"):
        return frozenset()
    before = frozenset(os.sched_getaffinity(0))
    for thread in (*_threads(), 0) if cores else ():
        with suppress(OSError):  # it has ended, or the system does not let us
            os.sched_setaffinity(thread, cores)
    return before


def _threads() -> list[int]:
    try:
        return [int(name) for name in os.listdir(TASKS)]
    except OSError:
        return []
