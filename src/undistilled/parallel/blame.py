"""Who is at fault where a run over ranks cannot go on: from signs of life and a clock to a verdict; no processes here.

A rank that waits names those it waits for (`Beat.awaits`). Blame goes along these to one that stays behind: the others
are where they are because of it. Who computes is to blame only where somebody has waited for it for too long and it has
not ended a layer meanwhile; GPUs that are at work in a long pass wait for nobody who is behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .messages import COMPUTING, IDLE, JOINING, LOADING, SETTLING, TOGETHER, Beat
from .places import LOST, UNTOLD

FAILED = 1  # the exit code of a rank that could not go on, as when another one was lost
RESTART = "The run is over: start it again."
GONE = {LOST: "is gone, and its host with it", UNTOLD: "is gone with what kept it on its host, which is there"}


JOIN = 30.0  # seconds, at least, that ranks may take to join: NCCL's start alone takes some


@dataclass(frozen=True)
class Limits:
    """watchdog: seconds without a sign of life, or behind while others wait, that a run allows."""

    watchdog: float

    def passed(self, beat: Beat) -> bool:
        """Whether a rank has been in what it is in for too long."""
        return beat.seconds > (max(self.watchdog, JOIN) if beat.doing == JOINING else self.watchdog)


@dataclass(frozen=True)
class Verdict:
    """A rank that is lost. why: "dead", "silent" or "stalled"; operation: what it was in; said: the words after its
    name; hint: the way out."""

    rank: int
    why: str
    operation: str
    said: str
    hint: str = RESTART


def doing(beat: Beat | None) -> str:
    """For "it was ...": what a rank is in, of which pass."""
    if beat is None:
        return "starting"
    if beat.doing in (LOADING, IDLE, JOINING):
        return beat.doing
    where = f"pass {beat.at}, collective {beat.entered}"
    return f"computing (pass {beat.at})" if beat.doing == COMPUTING else f"in {beat.doing} ({where})"


def dead(codes: Mapping[int, int], beats: Mapping[int, Beat]) -> Verdict | None:
    """Of ranks whose processes have ended, with exit codes (minus a signal's number, or one of GONE): the one to blame.
    Who failed did so because another was lost, if one was."""
    if not codes:
        return None
    rank = min(codes, key=lambda r: (codes[r] == FAILED, r))
    code, was = codes[rank], doing(beats.get(rank))
    return Verdict(rank, "dead", was, f"{GONE.get(code) or ended(code)}; it was {was}.")


def ended(code: int) -> str:
    """How a process did, by its exit code."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def silent(heard: Mapping[int, float], beats: Mapping[int, Beat], clock: float, limits: Limits) -> Verdict | None:
    """The rank that was `heard` last the longest ago, if that is too long."""
    rank = min(heard, key=lambda r: heard[r], default=None)
    if rank is None or clock - heard[rank] <= limits.watchdog:
        return None
    was = doing(beats.get(rank))
    said = f"has given no sign of life for {limits.watchdog:.0f} s; it was {was}."
    return Verdict(rank, "silent", was, said, "Its process hangs or was stopped. Start the run again.")


def stalled(beats: Mapping[int, Beat], limits: Limits) -> Verdict | None:
    """The rank behind, where one has waited for too long. `beats` has all ranks that say what they are in."""
    for waits in beats.values():
        if not waits.awaits or not limits.passed(waits):
            continue
        found = _behind_all(waits, beats)
        if not limits.passed(found):
            continue  # it moves: who waits for it may have to wait
        if not found.awaits:
            return _behind(found, waits)
        if found.doing != SETTLING and all(_still(beats.get(rank), limits) for rank in found.awaits):
            return _no_answer(found)
    return None


def _still(beat: Beat | None, limits: Limits) -> bool:
    return beat is not None and limits.passed(beat)


def _behind_all(waits: Beat, beats: Mapping[int, Beat]) -> Beat:
    """From one who waits to those behind it, and on, to one behind whom nobody is."""
    passed = {waits.rank}
    while True:
        peers = [beats[r] for r in waits.awaits if r in beats and r not in passed and is_behind(beats[r], waits)]
        if not peers:
            return waits
        waits = min(peers, key=lambda b: (bool(b.awaits), b.at, b.entered, -b.seconds, b.rank))
        passed.add(waits.rank)


def is_behind(other: Beat, waits: Beat) -> bool:
    """Whether `other` has not yet done what `waits` waits for. Ranks of a stage do the same collectives, so that their
    numbers within a pass compare; of another stage a pass is awaited."""
    if waits.doing in TOGETHER:
        return (other.at, other.entered) < (waits.at, waits.entered)
    return other.passes < waits.at


def _behind(found: Beat, waits: Beat) -> Verdict:
    was = doing(found)
    seconds = min(found.seconds, waits.seconds)
    said = f"has been {was} for {seconds:.0f} s, and others wait for it: rank {waits.rank} is {doing(waits)}."
    return Verdict(found.rank, "stalled", was, said)


def _no_answer(found: Beat) -> Verdict:
    was = doing(found)
    said = f"has been {was} for {found.seconds:.0f} s, although all that it waits for were there."
    return Verdict(found.rank, "stalled", was, said, "What is between the ranks may be lost. Start the run again.")
