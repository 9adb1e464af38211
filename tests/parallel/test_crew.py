"""The driver's side of ranks that end: here of a place without processes."""

import pytest

from undistilled import interrupt
from undistilled.errors import RankLost
from undistilled.parallel.crew import Crew
from undistilled.parallel.messages import IDLE, Beat


class Nobody:
    """Is there until it is killed."""

    where, code = "", None

    def poll(self):
        return self.code

    def kill(self):
        self.code = -9

    def wait(self, _seconds):
        pass


class Nowhere:
    size, closed = 2, False

    def bind(self, passes, reports):
        passes.bind("inproc://passes")
        reports.bind("inproc://reports")

    def start(self, _rank, _told):
        return Nobody()

    def close(self):
        self.closed = True


@pytest.fixture
def crew():
    made = Crew(Nowhere())
    yield made
    made.close()


def test_an_engine_whose_pass_was_interrupted_says_so(crew):
    """In a notebook Ctrl-C does not end the process: a later pass would wait for ranks that are gone."""
    with pytest.raises(KeyboardInterrupt), crew.guarded(lambda: Beat(0, 1, 1, IDLE, 0.0)):
        raise KeyboardInterrupt
    assert crew.processes[1].poll() == -9
    with pytest.raises(RankLost, match="interrupted"):
        crew.check()


def test_an_end_in_haste_leaves_nothing_behind(crew):
    interrupt.LAST[-1]()
    assert crew.processes[1].poll() == -9 and crew.place.closed
