"""Bodies of requests. Strict: no NaN, no number for a boolean, no string for a number."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..errors import RequestError
from ..schedule.request import MAX_BIAS, MAX_LOGPROBS, MAX_STOPS

MAX_COPIES = 16
MAX_PROMPTS = 128
MAX_MESSAGES = 10_000
MOST = {"stop": (list, MAX_STOPS, "strings"), "logit_bias": (dict, MAX_BIAS, "tokens")}
TEXT_PARTS = ("text", "input_text")
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, Field(ge=-1e6, le=1e6)]


NOTHING: tuple[Any, ...] = (None, False, "", [], {})
FREE = ("answers are not constrained", NOTHING)

# Fields that would change the answer -> why they are refused, and the values with which they change nothing.
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "chat_template": ("a request cannot bring a template", NOTHING),
    "chat_template_kwargs": ("a template gets the conversation and the tools", NOTHING),
    "continue_final_message": ("an answer is a message of its own", NOTHING),
}
REFUSED_GENERATING = REFUSED | {
    "suffix": ("the model continues a prompt, it does not fill in", NOTHING),
    "guided_json": FREE,
    "guided_regex": FREE,
    "guided_grammar": FREE,
    "guided_choice": FREE,
    "structured_outputs": FREE,
    "tool_choice": ("the model decides whether it calls a tool", (*NOTHING, "none", "auto")),
    "functions": ("tools has taken its place", NOTHING),
    "function_call": ("tool_choice has taken its place", (*NOTHING, "none", "auto")),
    "modalities": ("answers are text", (*NOTHING, ["text"])),
    "prompt_logprobs": ("prompts have no log-probabilities here", (None,)),
    "min_tokens": ("an answer ends where the model ends it; see ignore_eos", NOTHING),
    "include_stop_str_in_output": ("a text ends before its stop string", NOTHING),
    "skip_special_tokens": ("special tokens are not shown", (None, True)),
}


class Body(BaseModel):
    """Unknown fields are let through, for clients send many; those that would change the answer are refused."""

    refused: ClassVar = REFUSED
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, (reason, harmless) in cls.refused.items():
                if data.get(name) not in harmless:
                    raise RequestError(f"{name} is not supported: {reason}.", param=name, code="unsupported")
        return data


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: str

    @field_validator("type")
    @classmethod
    def _text(cls, value: str) -> str:
        if value != "text":
            raise RequestError(
                f"response_format {value[:50]!r} is not supported.", param="response_format", code="unsupported"
            )
        return value


class Generating(Body):
    """What completions and chat have in common. Ranges are checked by `Sampling.check`."""

    refused: ClassVar = REFUSED_GENERATING
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COPIES)] | None = None
    max_tokens: Int64 | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int64 | None = None
    min_p: Float | None = None
    repetition_penalty: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Int64], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, Float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @field_validator("stop", "logit_bias", mode="before")
    @classmethod
    def _not_giant(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        kind, most, what = MOST[name]
        if isinstance(value, kind) and len(value) > most:
            raise RequestError(f"{name} takes at most {most} {what}.", param=name)
        return value

    @property
    def copies(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generating):
    """`prompt`: a string, a list of strings, ids, or a list of lists of ids; see `prompts`.

    parse_special: whether control tokens in a string become control tokens, or stay text (the default).
    """

    prompt: Any = Field(json_schema_extra={"examples": ["The capital of France is"]})
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Int64 | None = None
    parse_special: bool = False

    @field_validator("best_of")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value is not None and value != 1:
            raise RequestError("best_of is not supported; use n.", param="best_of", code="unsupported")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        """At least one prompt; all strings or all ids. RequestError otherwise."""
        value = self.prompt
        if isinstance(value, str) or _is_ids(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise RequestError("prompt is a string, token ids, or a list of either.", param="prompt")
        if len(value) > MAX_PROMPTS:
            raise RequestError(f"At most {MAX_PROMPTS} prompts go into one request.", param="prompt")
        if all(isinstance(p, str) for p in value) or all(_is_ids(p) for p in value):
            return value
        raise RequestError("prompt is a string, token ids, or a list of either.", param="prompt")


class Message(BaseModel):
    """One turn. `content` arrives as a string, also where the client sent text parts."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return "\n".join(map(_part, value)) if isinstance(value, list) else value


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatBody(Generating):
    messages: Messages
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return self


class TokenizeBody(Body):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    parse_special: bool = False
    add_generation_prompt: bool = True


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Int64], Field(fail_fast=True)]
    skip_special_tokens: bool = False


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int for v in value)


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        raise RequestError(
            "A message's content is text; images, audio and files are not supported.",
            param="messages",
            code="unsupported",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError("A text part has a string as its text.", param="messages")
    return part["text"]
