"""Which cores ranks of one machine have: where memory has several nodes (sockets, mostly), each rank those of one, so
that it computes beside its weights and its cache; what it allocates then lies there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence


def shared_out(ranks: int, nodes: Sequence[Collection[int]]) -> list[tuple[int, ...]]:
    """The cores of each rank, of all nodes' cores; none where there is nothing to part, or it does not come out even.
    Ranks of one node share its cores: which of them are one core twice is not asked."""
    count = len(nodes)
    if count < 2 or ranks < 2 or (ranks % count and count % ranks):
        return []
    if ranks >= count:
        return [tuple(sorted(nodes[rank * count // ranks])) for rank in range(ranks)]
    each = count // ranks
    return [tuple(sorted(set().union(*nodes[at : at + each]))) for at in range(0, count, each)]


def confine(cores: Collection[int]) -> frozenset[int]:
    """Has this thread, and those that it will start, run on these cores; returns those that it might run on before.
    Nothing changes where there are none, or where the system does not have a say in it."""
    if not hasattr(os, "sched_setaffinity"):
        return frozenset()
    before = frozenset(os.sched_getaffinity(0))
    if cores:
        os.sched_setaffinity(0, cores)
    return before
