"""Verdicts on ranks, from signs of life alone: of two ranks in a stage, of a pipeline, and of both."""

import pytest

from undistilled.parallel.blame import Limits, dead, doing, silent, stalled
from undistilled.parallel.comm import RECEIVING, RETURNED
from undistilled.parallel.messages import COMPUTING, IDLE, JOINING, REDUCE, SETTLING, Beat
from undistilled.parallel.places import LOST, UNTOLD

LIMITS = Limits(watchdog=60)


def computing(rank, seconds, at=5, entered=7):
    return Beat(rank, at, entered, COMPUTING, seconds, at - 1)


def waits(rank, seconds, awaits, doing=REDUCE, at=5, entered=8):
    return Beat(rank, at, entered, doing, seconds, at - 1, awaits=awaits)


def idle(rank, seconds=100.0, at=4):
    return Beat(rank, at, 20, IDLE, seconds, at)


def judged(*beats):
    return stalled({b.rank: b for b in beats}, LIMITS)


def test_a_rank_that_others_wait_for_is_behind():
    found = judged(waits(0, 61, (1,)), computing(1, 61))
    assert (found.rank, found.why, found.operation) == (1, "stalled", "computing (pass 5)")
    assert found.said == (
        "has been computing (pass 5) for 61 s, and others wait for it: "
        "rank 0 is in all_reduce (pass 5, collective 8)."
    )
    assert judged(computing(0, 61), waits(1, 61, (0,))).rank == 0


@pytest.mark.parametrize("seconds", [(59, 61), (61, 59)])
def test_slow_is_not_lost(seconds):
    """Who waits has not waited for long enough, or who is waited for has ended a layer meanwhile."""
    assert judged(waits(0, seconds[0], (1,)), computing(1, seconds[1])) is None


def test_a_long_pass_that_nobody_waits_for_is_no_stall():
    assert judged(computing(0, 1000), computing(1, 1000)) is None


def test_gpus_at_work_are_no_stall():
    """Rank 0 has told its GPU everything and waits for it; so has rank 1, which is idle or waits too."""
    settling = Beat(0, 5, 21, SETTLING, 1000, 5, awaits=(1,))
    assert judged(settling, idle(1, 1000, at=5)) is None
    assert judged(settling, Beat(1, 5, 21, SETTLING, 1000, 5, awaits=(0,))) is None
    found = judged(settling, computing(1, 1000))
    assert found.rank == 1 and "waiting for the GPU" in found.said


def test_who_did_not_hear_of_a_pass_is_behind():
    """However long it has been idle, it is behind for as long as the others wait."""
    found = judged(waits(0, 70, (1,)), idle(1, 5000))
    assert found.rank == 1 and found.said.startswith("has been waiting for a pass for 70 s")
    assert judged(waits(0, 70, (1,)), idle(1, 1)) is None


def test_of_three_the_one_behind():
    found = judged(waits(0, 80, (1, 2)), waits(1, 80, (0, 2)), computing(2, 80))
    assert found.rank == 2
    found = judged(waits(0, 80, (1, 2)), waits(1, 80, (0, 2), entered=7), waits(2, 80, (0, 1), entered=7))
    assert found.rank in (1, 2) and "although all that it waits for were there" in found.said


def test_a_stage_behind_a_stage():
    """tp 2 x pp 2: stage 1 waits for stage 0, whose rank 1 hangs; rank 0 is where it is because of rank 1."""
    stage = (waits(0, 90, (1,)), computing(1, 95))
    after = [Beat(r, 5, 1, RECEIVING, 88, 4, awaits=(r - 2,)) for r in (2, 3)]
    assert judged(*after, *stage).rank == 1
    assert judged(*after, waits(0, 90, (1,)), computing(1, 3)) is None


def test_the_driver_waits_for_logits():
    """Its peer waits for it in a later pass; it waits for the last stage, in an earlier one."""
    driver = Beat(0, 3, 9, RETURNED, 70, 5, awaits=(2,))
    peer = waits(1, 65, (0,), at=6, entered=1)
    last = Beat(2, 3, 4, COMPUTING, 75, 2)
    assert judged(driver, peer, last, computing(3, 2, at=3)).rank == 2
    assert judged(driver, peer, computing(2, 10, at=3), computing(3, 2, at=3)) is None


def test_numbers_of_collectives_of_other_stages_do_not_compare():
    """A stage of few layers has begun fewer collectives of a pass than the one that waits for it."""
    first = Beat(0, 5, 3, COMPUTING, 70, 4)
    assert judged(first, Beat(1, 5, 40, RECEIVING, 70, 4, awaits=(0,))).rank == 0


def test_who_has_handed_over_is_not_behind():
    """The message is lost between the two: no rank is where it should not be."""
    found = judged(idle(0, at=5), Beat(1, 5, 1, RECEIVING, 70, 4, awaits=(0,)))
    assert found.rank == 1 and "What is between the ranks" in found.hint


def test_a_driver_that_is_in_no_step_is_not_judged():
    assert judged(waits(1, 70, (0,))) is None


def test_joining():
    def joins(rank, seconds):
        return Beat(rank, 0, 1, JOINING, seconds, awaits=tuple({0, 1, 2} - {rank}))

    found = judged(joins(0, 70), joins(1, 70), Beat(2, 0, 0, IDLE, 80))
    assert found.rank == 2
    assert judged(joins(0, 70), joins(1, 70), joins(2, 1)) is None
    assert doing(joins(1, 7)) == "joining the other ranks"
    short = Limits(3.0)  # NCCL alone takes as long to begin
    assert stalled({rank: joins(rank, 20) for rank in range(3)}, short) is None
    assert stalled({rank: joins(rank, 40) for rank in range(3)}, short).why == "stalled"


def test_all_in_one_collective_for_too_long():
    found = judged(waits(0, 70, (1,)), waits(1, 69, (0,)))
    assert found.why == "stalled" and "although" in found.said


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-9, "was killed by signal 9"),
        (3, "ended with code 3"),
        (0, "ended with code 0"),
        (LOST, "is gone, and its host"),
        (UNTOLD, "is gone with what kept it"),
    ],
)
def test_dead(code, said):
    found = dead({2: code}, {2: computing(2, 1)})
    assert (found.rank, found.why) == (2, "dead") and found.said.startswith(said)
    assert found.said.endswith("it was computing (pass 5).")


def test_who_failed_because_another_died():
    assert dead({1: 1, 2: -9}, {}).rank == 2
    assert dead({1: 1, 2: 1}, {}).rank == 1
    assert dead({}, {}) is None
    assert dead({1: -9}, {}).said.endswith("it was starting.")


def test_silent():
    heard = {1: 100.0, 2: 90.0}
    assert silent(heard, {}, 149, LIMITS) is None
    found = silent(heard, {2: waits(2, 1, (1,))}, 151, LIMITS)
    assert (found.rank, found.why) == (2, "silent")
    assert found.said == "has given no sign of life for 60 s; it was in all_reduce (pass 5, collective 8)."
