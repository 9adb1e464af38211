"""What a loaded model gives to a text: teacher-forced, in the prompt chunks that serving uses.

T tokens of a window, R rows of logits at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UndistilledError, UsageError
from ..generate.runner import ROWS, Runner
from ..model.decoder import Decoder
from ..plan.plan import Plan
from ..schedule.request import Request
from ..schedule.scheduler import Sequence, Work


class Scorer:
    """A decoder with its plan's cache. Holds one text at a time, always in the cache's first blocks."""

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        self.decoder, self.plan = decoder, plan
        self.runner = Runner(decoder, plan)
        self.capacity = min(plan.limits.context, plan.kv.blocks * plan.kv.block_size)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Float32 logits [T, V] on the CPU: row t is what follows tokens[: t + 1]."""
        return torch.cat([rows.cpu() for rows in self.rows(tokens)])

    def rows(self, tokens: list[int]) -> Iterator[torch.Tensor]:
        """The same logits in order, [R, V] at a time, so that the whole [T, V] never has to exist."""
        for hidden_TD in self._chunks(self._sequence(tokens), 0, len(tokens)):
            yield from self._heads(hidden_TD)

    def choice_loglikelihoods(self, context: list[int], choices: list[list[int]]) -> list[float]:
        """Natural log-likelihood of each choice's ids after `context`; the context is run once.

        A choice overwrites the slots that the one before it used after the context.
        """
        if not context or not all(choices):
            raise UsageError("A context and a choice to score have at least one token each.")
        before = self._sequence(context)
        for hidden_TD in self._chunks(before, 0, len(context)):
            last = hidden_TD[-1:]
        first = next(self._heads(last)).log_softmax(-1)[0]
        return [self._choice(context, choice, first) for choice in choices]

    def _choice(self, context: list[int], choice: list[int], first_V: torch.Tensor) -> float:
        total = first_V[choice[0]].double()
        if len(choice) > 1:
            sequence = self._sequence(context + choice[:-1])
            at = 1
            for hidden_TD in self._chunks(sequence, len(context), len(sequence.tokens)):
                for logits_RV in self._heads(hidden_TD):
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

    def _chunks(self, sequence: Sequence, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Hidden states [T, D] of tokens [start, stop), a prompt chunk at a time."""
        chunk = self.plan.limits.chunk
        for at in range(start, stop, chunk):
            with torch.inference_mode():
                batch = self.runner.batch([Work(sequence, at, min(stop, at + chunk))], prefill=True)
                hidden_TD = self.decoder(batch, self.runner.caches)
            yield hidden_TD

    def _heads(self, hidden_TD: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits in groups so small that the head runs as it does in decoding, without a dense copy of it."""
        for rows_RD in hidden_TD.split(ROWS[self.runner.device.type]):
            with torch.inference_mode():
                logits_RV = self.decoder.logits(rows_RD)
                if not logits_RV.isfinite().all():
                    raise UndistilledError(f"{self.plan.model} as {self.plan.scheme}: its logits hold NaN or infinity.")
            yield logits_RV
