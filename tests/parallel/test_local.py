"""A rank's process ends with whoever started it, also where the kernel does not see to that."""

import zmq

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.generate.engine import plan_for
from undistilled.parallel.messages import Ready, Report
from undistilled.parallel.places import place_for
from undistilled.wire import Wire, bounded


def test_a_rank_ends_with_its_input(tmp_path):
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(folder)
    options = {"model": str(folder), "scheme": "fp32", "device": "cpu", "pp": 2}
    place = place_for("local", plan_for(find(str(folder)), options), str(folder))
    wire = Wire("key", Report)
    with zmq.Context() as context, context.socket(zmq.PUB) as passes, context.socket(zmq.PULL) as reports:
        bounded(reports)
        place.bind(passes, reports)
        process = place.start(1, {"key": "key", "patience": 60})
        try:
            heard = None
            while not isinstance(heard, Ready):
                assert reports.poll(60000)
                heard = wire.unpack(reports.recv_multipart())
            assert process.poll() is None
            process.process.stdin.close()
            process.wait(10)
            assert process.poll() == 1
        finally:
            process.kill()
            process.wait(5)
            place.close()
