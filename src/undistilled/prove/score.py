"""What a loaded model gives to a text: teacher-forced, in the prompt chunks that serving uses.

T tokens of a window, R rows of logits at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UndistilledError, UsageError
from ..generate.part import ROWS
from ..generate.runner import Runner
from ..model.decoder import Decoder
from ..plan.plan import Plan
from ..schedule.request import Request
from ..schedule.scheduler import Sequence, Work


class Scorer:
    """A decoder with its plan's cache. Holds one text at a time, always in the cache's first blocks."""

    def __init__(self, decoder: Decoder, plan: Plan, runner: Runner | None = None) -> None:
        """runner: of an engine over several ranks, of which `decoder` is the first one's part."""
        self.decoder, self.plan = decoder, plan
        self.runner = runner or Runner(decoder, plan)
        self.capacity = min(plan.limits.context, plan.kv.blocks * plan.kv.block_size)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Float32 logits [T, V] on the CPU: row t is what follows tokens[: t + 1]."""
        return torch.cat([rows.cpu() for rows in self.rows(tokens)])

    def rows(self, tokens: list[int]) -> Iterator[torch.Tensor]:
        """The same logits in order, [R, V] at a time, so that the whole [T, V] never has to exist."""
        for work in self._chunks(self._sequence(tokens), 0, len(tokens)):
            yield from self._logits(work)

    def choice_loglikelihoods(self, context: list[int], choices: list[list[int]]) -> list[float]:
        """Natural log-likelihood of each choice's ids after `context`; the context is run once.

        A choice overwrites the slots that the one before it used after the context.
        """
        if not context or not all(choices):
            raise UsageError("A context and a choice to score have at least one token each.")
        before = self._sequence(context)
        for work in self._chunks(before, 0, len(context)):
            last_1V = next(self._logits(work, last=True))
        first = last_1V.log_softmax(-1)[0]
        return [self._choice(context, choice, first) for choice in choices]

    def _choice(self, context: list[int], choice: list[int], first_V: torch.Tensor) -> float:
        total = first_V[choice[0]].double()
        if len(choice) > 1:
            sequence = self._sequence(context + choice[:-1])
            at = 1
            for work in self._chunks(sequence, len(context), len(sequence.tokens)):
                for logits_RV in self._logits(work):
                    wanted = torch.tensor(choice[at : at + len(logits_RV)], device=logits_RV.device)
                    total += logits_RV.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
                    at += len(wanted)
        return float(total)

    def _sequence(self, tokens: list[int]) -> Sequence:
        if not 0 < len(tokens) <= self.capacity:
            raise UsageError(
                f"{len(tokens)} tokens to score; the plan has room for 1 to {self.capacity}.",
                "Plan with a larger --context.",
            )
        blocks = -(-len(tokens) // self.plan.kv.block_size)
        return Sequence(Request("prove", tokens), tokens, blocks=list(range(blocks)))

    def _chunks(self, sequence: Sequence, start: int, stop: int) -> Iterator[Work]:
        """Tokens [start, stop), a prompt chunk at a time."""
        chunk = self.plan.limits.chunk
        return (Work(sequence, at, min(stop, at + chunk)) for at in range(start, stop, chunk))

    def _logits(self, work: Work, last: bool = False) -> Iterator[torch.Tensor]:
        """Run a chunk; its logits [R, V], or its last token's, in groups so small that the head runs as in decoding."""
        for logits_RV in self._over_ranks(work, last) if self.runner.crew else self._here(work, last):
            if not logits_RV.isfinite().all():
                raise UndistilledError(f"{self.plan.model} as {self.plan.scheme}: its logits hold NaN or infinity.")
            yield logits_RV

    def _here(self, work: Work, last: bool) -> Iterator[torch.Tensor]:
        """Without a dense copy of the head, and without all rows at once."""
        with torch.inference_mode():
            hidden_TD = self.decoder(self.runner.batch([work], prefill=True), self.runner.caches)
        for rows_RD in (hidden_TD[-1:] if last else hidden_TD).split(ROWS[self.runner.device.type]):
            with torch.inference_mode():
                logits_RV = self.decoder.logits(rows_RD)
            yield logits_RV

    def _over_ranks(self, work: Work, last: bool) -> Iterator[torch.Tensor]:
        """A chunk's rows come together: rank 0 and the last stage have room for them beside the plan's."""
        count = work.stop - work.start
        rows = self.runner.teach(work, [count - 1] if last else list(range(count)))
        return iter(rows.split(ROWS[self.runner.device.type]))
