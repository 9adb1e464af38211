"""An engine that is started again where it ends: for runs over several machines, of which one may fail."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any

from ..checkpoint.tokenizer import Tokenizer
from ..events import emit
from ..schedule.request import Request
from .client import CLOSE_SECONDS, EngineClient
from .stream import Stream

MOST, WITHIN = 3, 3600.0  # times that an engine is started again, in so many seconds
TICK = 0.2  # seconds
log = logging.getLogger("undistilled.serve")

Start = Callable[[], Awaitable[EngineClient]]


async def open_client(options: dict[str, Any], **more: Any) -> EngineClient | Again:
    """A client whose engine is ready (`EngineClient.start`); of a cluster, one that starts it again."""
    start = partial(EngineClient.start, options, **more)
    return await (Again.start(start) if options.get("cluster") else start())


class Again:
    """What the routes need of an `EngineClient`, from the one that runs now. `over`: none will follow it."""

    def __init__(self, first: EngineClient, start: Start) -> None:
        self._client, self._start = first, start
        self.name, self.max_context, self.vocab = first.name, first.max_context, first.vocab
        self.tokenizer: Tokenizer = first.tokenizer
        self._times: deque[float] = deque(maxlen=MOST)
        self._over = False
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, start: Start) -> Again:
        """One whose first engine is ready. Raises what `start` raises."""
        return cls(await start(), start)

    @property
    def alive(self) -> bool:
        return self._client.alive

    @property
    def over(self) -> bool:
        return self._over

    @property
    def trouble(self) -> str:
        if self.alive or self.over:
            return self._client.trouble
        return f"{self._client.trouble} It is started again."

    def stats(self) -> dict[str, float]:
        return self._client.stats()

    async def submit(self, request: Request) -> Stream:
        return await self._client.submit(request)

    async def close(self, grace: float = CLOSE_SECONDS) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._client.close(grace)

    async def _watch(self) -> None:
        while True:
            while self.alive:
                await asyncio.sleep(TICK)
            now = monotonic()
            if len(self._times) == MOST and now - self._times[0] < WITHIN:
                self._over = True
                return
            self._times.append(now)
            await self._renew()

    async def _renew(self) -> None:
        """Close what is left of the old engine, and open another."""
        why = self._client.trouble
        emit("engine.restart", why=why, times=len(self._times))
        log.error("%s It is started again, for the %d. of %d times.", why, len(self._times), MOST)
        try:
            await self._client.close()
            self._client = await self._start()
            log.info("The engine is back.")
        except Exception as error:  # of whatever kind: the next try, or the end, comes from here alone
            log.error("It did not start: %s: %s", type(error).__name__, error)
