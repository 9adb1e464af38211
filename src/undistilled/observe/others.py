"""How busy a machine is with something else while something is measured."""

from __future__ import annotations

from time import perf_counter

import psutil


class Others:
    """What others take of the machine's cores from now on: other programs, and other guests of the same host."""

    def __init__(self) -> None:
        self.began, self.before = perf_counter(), _all() - _own()

    def cores(self) -> float:
        """Cores' worth, on average since the beginning."""
        return max(0.0, (_all() - _own() - self.before) / max(perf_counter() - self.began, 1e-9))


def _all() -> float:
    """Seconds that all cores were busy, or the host kept them from us."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own() -> float:
    """Seconds of this process and of those that it started."""
    this = psutil.Process()
    spent = sum(this.cpu_times()[:4])  # with children that have ended
    for child in this.children(recursive=True):
        try:
            spent += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return spent
