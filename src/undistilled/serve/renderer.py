"""Chat templates are rendered in a process of their own (`sandbox.py`), which the kernel ends at its limits.

No check inside Python stops a template within a single call of C: comparing or sorting shared lists can take
longer than the universe is old. The process starts with the first rendering, serves all that follow, and is
replaced after one that ended it. One line of JSON goes in, one comes out.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from threading import Lock, Timer
from typing import Any

from .. import interrupt

MAX_SOURCE = 256 * 1024  # characters of a template
MAX_OUTPUT = 8 * 1024 * 1024  # characters of a rendered prompt
MAX_ANSWER = 6 * MAX_OUTPUT + 1024  # bytes; JSON writes a control character as six
MAX_SECONDS = 2.0  # CPU time of one rendering
MAX_MEMORY = 1 << 30  # bytes of the process's addresses
MAX_WAIT = 30.0  # seconds of the clock, for a process that gets no CPU time


class TemplateError(Exception):
    """A template does not compile, asks for what it may not have, or runs past a limit."""


class Renderer:
    """The process and the way to it. Any thread may call; they take turns."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """The template's text. TemplateError past any limit, or with what the template raises."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it is longer than {MAX_SOURCE} characters")
        request = {"source": source, "variables": variables, "seconds": MAX_SECONDS}
        with self._lock:
            answer = self._ask(pack(request))
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _ask(self, line: bytes) -> dict[str, Any]:
        """The answer to a line. A process that does not give one whole is ended: the next line has a new one."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        watchdog = Timer(MAX_WAIT, process.kill)
        watchdog.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return json.loads(process.stdout.readline(MAX_ANSWER))
        except (OSError, ValueError):
            raise TemplateError(
                f"it takes more than {MAX_SECONDS:g} s or {MAX_MEMORY >> 20} MiB (its process ended: {self.stop()})"
            ) from None
        except BaseException:  # as Ctrl-C does: this answer is not the next line's
            self.stop()
            raise
        finally:
            watchdog.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            command = [sys.executable, "-P", "-m", "undistilled.serve.sandbox"]
            with interrupt.shielded():
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def stop(self) -> int | None:
        """End the process, if there is one; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdout, process.stdin):
            try:
                assert pipe is not None
                pipe.close()
            except OSError:  # what was not written finds no reader
                pass
        return process.wait()


def pack(value: dict[str, Any]) -> bytes:
    """A line of JSON; halves of surrogate pairs pass through it."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


RENDERER = Renderer()
render = RENDERER.render
atexit.register(RENDERER.stop)
