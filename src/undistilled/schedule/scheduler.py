"""What runs next: prompts in chunks, then one token for every running request. Imports no torch.

A prompt is always cut at the same places (multiples of `chunk` from its start), whoever else is in the
queue, so that a request meets the same arithmetic alone and in company. When blocks run out, the
request that came last gives its own back and later runs again: its prompt in the same chunks, and the
tokens it had already chosen as rows, the way they were first computed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..errors import RequestError
from ..events import emit
from .blocks import BlockPool
from .request import Request


@dataclass
class Sequence:
    """A request in work. `computed` counts tokens whose cache entries are written, `scheduled` those that a pass in
    work will have written; `epoch` counts how often it began anew."""

    request: Request
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    scheduled: int = 0
    epoch: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)


@dataclass
class Work:
    """Tokens [start, stop) of a sequence to run. `samples`: whether its last token's logits choose a token."""

    sequence: Sequence
    start: int
    stop: int
    epoch: int = 0

    @property
    def stale(self) -> bool:
        """Whether the sequence ended or began anew since: what comes of it counts no more."""
        return self.epoch != self.sequence.epoch

    @property
    def samples(self) -> bool:
        return self.stop == len(self.sequence.tokens)


@dataclass
class Step:
    """One turn of the engine: prompt chunks, each run on its own, and rows, run together."""

    prompts: list[Work] = field(default_factory=list)
    rows: list[Work] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prompts or self.rows)


class Scheduler:
    """Requests waiting, in order of arrival, and requests that run."""

    def __init__(
        self, pool: BlockPool, *, max_batch: int, max_context: int, chunk: int, max_waiting: int = 1024
    ) -> None:
        self.pool, self.max_batch, self.chunk = pool, max_batch, chunk
        self.max_context = min(max_context, pool.count * pool.size)  # more could never run, however long it waited
        self.max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request) -> Sequence:
        """Queue a request. RequestError where it can never run, or where the queue is full."""
        length = len(request.prompt)
        if not length:
            raise RequestError("The prompt is empty.", param="prompt")
        if length >= self.max_context:
            raise RequestError(
                f"The prompt has {length} tokens; this server's context is {self.max_context}.",
                param="prompt",
                code="context_length_exceeded",
            )
        if len(self.waiting) >= self.max_waiting:
            raise RequestError("Too many requests are waiting.", status=503, type="server_error", code="queue_full")
        sequence = Sequence(request, list(request.prompt))
        self.waiting.append(sequence)
        return sequence

    def step(self, rows: int | None = None) -> Step:
        """Choose the next turn's work and give it blocks: at most `rows` requests' rows, none of a request in work."""
        step = Step()
        for sequence in list(self.running):
            ready = sequence in self.running and sequence.scheduled <= sequence.computed < len(sequence.tokens)
            if ready and (rows is None or len(step.rows) < rows):
                self._advance(sequence, step)
        while self.waiting and len(self.running) < self.max_batch and not step.prompts:
            sequence = self.waiting[0]
            if not self._room(sequence, min(self.chunk, sequence.prompt_length)):
                break
            self.running.append(self.waiting.popleft())
            self._advance(sequence, step)
        return step

    def _advance(self, sequence: Sequence, step: Step) -> None:
        start, prompt = sequence.computed, sequence.prompt_length
        is_prompt = start < prompt
        if is_prompt and step.prompts:
            return  # one chunk a turn, so that rows of others wait for no more than that
        stop = min(start - start % self.chunk + self.chunk, prompt) if is_prompt else len(sequence.tokens)
        if not is_prompt:
            stop = min(stop, start + self.chunk)
        if self._grow(sequence, stop, step):
            (step.prompts if is_prompt else step.rows).append(Work(sequence, start, stop, sequence.epoch))
            sequence.scheduled = stop

    def _room(self, sequence: Sequence, tokens: int) -> bool:
        return self.pool.needed(tokens) - len(sequence.blocks) <= self.pool.free

    def _grow(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """Blocks for the first `tokens` tokens; takes them from the latest arrivals where none is free."""
        missing = self.pool.needed(tokens) - len(sequence.blocks)
        while missing > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.take(missing) or [] if missing > 0 else []
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        emit("schedule.preempt", id=victim.request.id, tokens=len(victim.tokens))
        self._release(victim)
        self.running.remove(victim)
        self.waiting.appendleft(victim)
        for works in (step.prompts, step.rows):
            works[:] = [w for w in works if w.sequence is not victim]

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.scheduled = [], 0, 0
        sequence.epoch += 1

    def done(self, work: Work, token: int | None) -> None:
        """`work` ran; `token` is what its last logits chose, if they chose one. Stale work is nothing."""
        if work.stale:
            return
        work.sequence.computed = work.stop
        if token is not None:
            work.sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)
