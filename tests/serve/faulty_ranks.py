"""An engine over ranks of which one stalls in its second pass: `python -m faulty_ranks` is a rank's process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from undistilled.generate import rank as real
from undistilled.generate.engine import open_engine as open_real
from undistilled.parallel import local
from undistilled.parallel.comm import Comm

STALLS, RAISES, ABSENT = "FAULTY_RANK", "FAULTY_DRIVER", "FAULTY_START"


def stall_in(comm_class: type[Comm]) -> None:
    """The rank that the environment names never enters its 40th collective."""
    reduce = comm_class.all_reduce

    def stalling(self, x):
        if os.environ.get(RAISES) and self.rank == 0 and self.entered > 40:
            raise MemoryError("none left")
        if str(self.rank) == os.environ.get(STALLS) and self.entered > 40:
            time.sleep(600)
        return reduce(self, x)

    comm_class.all_reduce = stalling


def open_engine(options, progress=None):
    local.RANK = "faulty_ranks"
    os.environ[STALLS] = str(options.pop("stalls", ""))
    os.environ[RAISES] = str(options.pop("raises", ""))
    os.environ[ABSENT] = str(options.pop("absent", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    stall_in(Comm)
    return open_real(options, progress)


if __name__ == "__main__":
    stall_in(Comm)
    if os.environ.get(ABSENT):
        Comm.__init__ = lambda *_: 1 / 0
    real.main()
