"""What the driver and the other ranks say to each other."""

from __future__ import annotations

import msgspec

# what a rank does, but for messages
LOADING, IDLE, JOINING = "loading", "waiting for a pass", "joining the other ranks"
COMPUTING, SETTLING = "computing", "waiting for the GPU"
REDUCE, GATHER = "all_reduce", "all_gather"
TOGETHER = (JOINING, REDUCE, GATHER)  # what all ranks of a stage do, in one order


class Pass(msgspec.Struct, tag=True):
    """One pass through the model: tokens of one prompt chunk (`prefill`), or rows of several requests.

    tables: block tables, of equal length; contexts: tokens seen, by row; last: rows whose logits are wanted.
    """

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    tables: list[list[int]]
    contexts: list[int]
    prefill: bool
    last: list[int]


WORD = 9  # bytes that a number may take


def largest(rows: int, chunk: int, blocks: int) -> int:
    """Bytes that a Pass takes at most: of so many rows, or a chunk of so many tokens, with `blocks` blocks a table."""
    return WORD * (rows * (blocks + 7) + 5 * chunk + blocks) + 4096


class Here(msgspec.Struct, tag=True):
    """The driver lives."""


class Stop(msgspec.Struct, tag=True):
    """The rank's process ends."""


class Watch(msgspec.Struct, tag=True):
    """From now on, say when messages between stages were sent and received."""


class Loading(msgspec.Struct, tag=True):
    """done, total: bytes of the rank's own share."""

    rank: int
    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The rank has its weights and waits for the others."""

    rank: int


class Broke(msgspec.Struct, tag=True):
    """The rank ends by an error. kind: the name of a class in `errors`, or of another exception."""

    rank: int
    kind: str
    message: str
    hint: str = ""


class Beat(msgspec.Struct, tag=True):
    """A sign of life. at: the number of the pass that the rank is in, or was in last; entered: collectives and messages
    begun in it; doing: what the rank is in, for `seconds`; awaits: the ranks without which that does not end; passes:
    done."""

    rank: int
    at: int
    entered: int
    doing: str
    seconds: float
    passes: int = 0
    busy: float = 0.0  # seconds of computing so far
    waited: float = 0.0  # seconds in collectives and messages so far
    awaits: tuple[int, ...] = ()
    peak: int = 0  # bytes that the process has taken on its device at most so far


class Handed(msgspec.Struct, array_like=True):
    """A message between stages, at one of its ends: when that began and ended, by the host's clock; bytes."""

    operation: str
    began: float
    ended: float
    nbytes: int


class Moved(msgspec.Struct, tag=True):
    """What a rank sent and received since its last report."""

    rank: int
    moves: list[Handed]


Command = Pass | Here | Watch | Stop
Report = Loading | Ready | Broke | Beat | Moved
