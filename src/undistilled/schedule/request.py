"""A request as the engine sees it, and what it answers. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIAS = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 leave everything in.

    logprobs: how many alternatives to report beside the chosen token; None reports nothing.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()

    def check(self, vocab: int) -> None:
        """RequestError naming the parameter that is out of its range."""
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise RequestError(f"{name} is {value}, expected {low} to {high}.", param=name)
        if len(self.stop) > MAX_STOPS or any(not s or len(s) > MAX_STOP_CHARS for s in self.stop):
            raise RequestError(
                f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.", param="stop"
            )
        if len(self.logit_bias) > MAX_BIAS:
            raise RequestError(f"logit_bias takes at most {MAX_BIAS} tokens.", param="logit_bias")
        for token, bias in self.logit_bias:
            if not (0 <= token < vocab and -100 <= bias <= 100):
                raise RequestError(
                    f"logit_bias has {token}: {bias}; tokens are 0 to {vocab - 1}, biases -100 to 100.",
                    param="logit_bias",
                )
        if len(self.stop_ids) > MAX_STOPS or any(not 0 <= t < vocab for t in self.stop_ids):
            raise RequestError(f"stop_token_ids takes at most {MAX_STOPS} ids below {vocab}.", param="stop_token_ids")


RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 2**31),
    ("temperature", 0, 2),
    ("top_p", 1e-6, 1),
    ("top_k", 0, 2**31),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 10),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
)


@dataclass
class Request:
    """A prompt of token ids and how to continue it. `id` is unique among running requests."""

    id: str
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class TokenLogprob:
    """A token's natural log-probability before temperature and penalties, and the best alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Output:
    """News of a request: new tokens and the text that they complete (never half a UTF-8 character).

    finish_reason: None while it runs, then "stop", "length", "abort" or "error".
    """

    id: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
