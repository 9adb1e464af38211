"""How much of a pipeline's messages is hidden: made-up timelines, and a run's own."""

import pytest

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint
from undistilled.events import Event, emit, subscribed
from undistilled.generate.engine import open_engine
from undistilled.observe.bench import bench
from undistilled.parallel.comm import HANDING, RECEIVING, RETURNED, RETURNING
from undistilled.parallel.messages import Handed
from undistilled.parallel.moves import Moves, overlap
from undistilled.plan.mesh import Mesh

TWO = Mesh(stages=((0, 2), (2, 4)), devices=("cpu", "cpu"))


def handed(*messages, nbytes=100):
    """Of (sent, asked for, there), in seconds: what rank 0 and rank 1 saw."""
    sends = [Handed(HANDING, sent, sent + 0.001, nbytes) for sent, _, _ in messages]
    return {0: sends, 1: [Handed(RECEIVING, asked, there, nbytes) for _, asked, there in messages]}


@pytest.mark.parametrize(
    "messages, seconds, efficiency",
    [
        ([(1.0, 0.5, 1.1)], 0.1, 0.0),  # waited for from before it was sent: all of it shows
        ([(1.0, 0.5, 1.1), (2.0, 2.5, 2.5)], 0.2, 0.5),  # the second was there when it was asked for
        ([(1.0, 0.5, 1.1), (2.0, 2.05, 2.1)], 0.2, 0.25),  # asked for when half of its way was done
        ([(1.0, 0.2, 1.1), (2.0, 9.0, 9.0), (3.0, 9.1, 9.1)], 0.3, 2 / 3),  # how long it then lay there does not count
        ([], 0.0, 1.0),
    ],
)
def test_what_is_hidden(messages, seconds, efficiency):
    found = overlap(TWO, handed(*messages))
    assert found.seconds == pytest.approx(seconds) and found.efficiency == pytest.approx(efficiency)


def test_logits_come_back_too_and_sums_do_not_count():
    moves = handed((1.0, 0.5, 1.1))
    moves[1] += [Handed(RETURNING, 2.0, 2.0, 8)]
    moves[0] += [Handed(RETURNED, 1.5, 2.3, 8)]
    assert overlap(TWO, moves).seconds == pytest.approx(0.4)
    kept = Moves()
    with subscribed(kept):
        emit("comm", operation="all_reduce", bytes=5, seconds=0.1, rank=0)
        emit("comm", operation=RECEIVING, bytes=7, seconds=0.1, rank=0)
    [only] = kept.take()
    assert only.nbytes == 7 and only.ended - only.began == pytest.approx(0.1) and kept.take() == []


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_run_tells(tmp_path, microbatches):
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(folder)
    options = {"model": str(folder), "scheme": "fp32", "device": "cpu", "pp": 2, "batch": 2, "context": 64}
    engine = open_engine(options | {"microbatches": microbatches})
    told: list[Event] = []
    try:
        with subscribed(told.append):
            result = bench(engine, 8, 16, 2, 2)
        sent = [e.fields["bytes"] for e in told if e.name == "comm" and e.fields["operation"] == HANDING]
        received = [m.nbytes for m in engine.runner.crew.moves[1] if m.operation == RECEIVING]
        assert received and received == sent[-len(received) :]
    finally:
        engine.close()
    assert 0 <= result["overlap"] <= 1 and 0 < result["transfer_s"] < result["elapsed_s"]
    [event] = [e for e in told if e.name == "ranks"]
    assert event.fields["overlap"] == result["overlap"] and set(event.fields) >= {"bubble", "imbalance", "transfer_s"}
