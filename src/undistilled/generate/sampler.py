"""Choosing a token from logits. V vocabulary. A request's choices depend on its own logits, history and seed alone."""

from __future__ import annotations

import torch

from ..schedule.request import Sampling, TokenLogprob

COLDEST = 1e-5  # below this temperature, the most likely token and nothing else


class Sampler:
    """One request's sampling state: its generator, and counts of what it has produced."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab: int) -> None:
        self.sampling = sampling
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self.generator = torch.Generator()
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed & (2**63 - 1))
        self.counts: dict[int, int] = {}
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def choose(self, logits_V: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log-probability where the request asked for it. Logits are float32."""
        s = self.sampling
        raw = logits_V.cpu()
        logits = self._penalised(raw)
        token = int(logits.numpy().argmax()) if s.temperature < COLDEST else self._draw(logits)
        self.counts[token] = self.counts.get(token, 0) + 1
        return token, self._report(raw, token) if s.logprobs is not None else None

    def _penalised(self, logits_V: torch.Tensor) -> torch.Tensor:
        s = self.sampling
        if not (s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1):
            return logits_V
        logits = logits_V.clone()
        for token, bias in s.logit_bias:
            logits[token] += bias
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.seen | self.counts.keys()), dtype=torch.int64)
            chosen = logits[seen]
            logits[seen] = torch.where(chosen > 0, chosen / s.repetition_penalty, chosen * s.repetition_penalty)
        if self.counts and (s.presence_penalty or s.frequency_penalty):
            tokens = torch.tensor(list(self.counts))
            times = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            logits[tokens] -= s.presence_penalty + s.frequency_penalty * times
        return logits

    def _draw(self, logits_V: torch.Tensor) -> int:
        s = self.sampling
        logits, order = logits_V.double().sort(descending=True)
        probs = ((logits - logits[0]) / s.temperature).softmax(-1)
        if s.top_k:
            probs[s.top_k :] = 0
            probs /= probs.sum()
        keep = probs >= s.min_p * probs[0]
        if s.top_p < 1:
            keep &= probs.cumsum(-1) - probs < s.top_p
        probs = probs * keep
        return int(order[torch.multinomial(probs, 1, generator=self.generator)])

    def _report(self, logits_V: torch.Tensor, token: int) -> TokenLogprob:
        logprobs = logits_V.log_softmax(-1)
        best = logprobs.topk(min(self.sampling.logprobs or 0, len(logprobs)))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top)
