"""Stop strings in a stream: text is held back while it may be the beginning of one."""

from __future__ import annotations


class StopText:
    """Cuts a stream of text before the first stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was met or None). `last`: nothing follows."""
        if not self.stops:
            return text, None
        self.held += text
        found = [(at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            shown, self.held = self.held[:at], ""
            return shown, stop
        keep = 0 if last else self._open_ended()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, None

    def _open_ended(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = min(len(self.held), max(len(s) for s in self.stops) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self.held[-length:]) for s in self.stops):
                return length
        return 0
