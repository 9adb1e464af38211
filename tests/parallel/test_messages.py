"""The bound of a pass follows from its plan, and a rank hears the largest one."""

import pytest
import zmq

from undistilled.parallel.messages import Command, Pass, largest
from undistilled.wire import MAX_MESSAGE, Wire, bounded, hidden, unveiled

HIGH = (1 << 63) - 1


def biggest(rows, chunk, blocks):
    """The pass of so many rows, or of a chunk, whose numbers take most bytes."""
    count = rows or chunk
    ids = [HIGH] * count
    tables = [[HIGH] * blocks] * (rows or 1)
    return Pass(ids, ids, ids, tables, [HIGH] * (rows or 1), not rows, list(range(count)))


@pytest.mark.parametrize("rows, chunk, blocks", [(31, 512, 64), (4096, 4096, 10240), (1, 16, 1)])
def test_no_pass_exceeds_the_bound(rows, chunk, blocks):
    wire = Wire("key", Command)
    rows = min(rows, 64) if blocks > 1000 else rows  # of 4,096 rows it would be 377 MB
    for one in (biggest(rows, 0, blocks), biggest(0, chunk, blocks)):
        assert len(wire.pack(one)[1]) <= largest(rows, chunk, blocks)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_pass_beyond_the_usual_bound_arrives(tmp_path, encrypted):
    rows, blocks = 900, 10240
    wire, one = Wire("key", Command), biggest(rows, 0, blocks)
    packed = wire.pack(one)
    assert len(packed[1]) > MAX_MESSAGE
    with zmq.Context() as context, context.socket(zmq.PUSH) as out, context.socket(zmq.PULL) as inbox:
        if encrypted:
            public, secret = zmq.curve_keypair()
            hidden(out, secret)
            unveiled(inbox, public.decode())
        bounded(inbox, largest(rows, 512, blocks))
        out.bind(f"ipc://{tmp_path}/s")
        inbox.connect(f"ipc://{tmp_path}/s")
        out.send_multipart(packed)
        assert inbox.poll(20000)
        assert wire.unpack(inbox.recv_multipart()) == one


def test_who_does_not_know_the_key_hears_nothing():
    public, secret = zmq.curve_keypair()
    other, _ = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.PUSH) as out:
        hidden(out, secret)
        out.bind("tcp://127.0.0.1:*")
        with context.socket(zmq.PULL) as stranger, context.socket(zmq.PULL) as plain:
            unveiled(stranger, other.decode())
            for inbox in (stranger, plain):
                inbox.connect(out.getsockopt_string(zmq.LAST_ENDPOINT))
            assert not stranger.poll(500)
            with pytest.raises(zmq.Again):  # nobody is there
                out.send(b"pass", zmq.NOBLOCK)
        with context.socket(zmq.PULL) as rank:
            unveiled(rank, public.decode())
            rank.connect(out.getsockopt_string(zmq.LAST_ENDPOINT))
            out.set(zmq.SNDTIMEO, 10000)
            out.send(b"pass")
            assert rank.poll(10000) and rank.recv() == b"pass"
