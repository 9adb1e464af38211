"""From chat messages to prompt ids. What a person wrote is text, whatever it looks like."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact, RequestError, UsageError
from .renderer import TemplateError, render

R1_TEMPLATE = """
{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' -%}
  {%- set ns.system = ns.system ~ ('\\n\\n' if not loop.first else '') ~ m.content -%}
{%- endfor -%}
{{- bos_token ~ ns.system -}}
{%- for m in messages if m.role != 'system' -%}
  {%- if m.role == 'user' -%}
    {{- '<｜User｜>' ~ m.content -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<｜Assistant｜>' ~ m.content ~ '<｜end▁of▁sentence｜>' -}}
  {%- else -%}
    {{- raise_exception('this template has no place for the role ' ~ m.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
"""R1's conversation, as its release writes it, for a tokenizer that carries no template."""

R1_ASSISTANT, THINK, END_THINK = "<｜Assistant｜>", "<think>", "</think>"
NO_THOUGHT = f"{THINK}\n\n{END_THINK}\n\n"  # reasoning that ended before it began
SAMPLE = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Prompt:
    """Ids of a conversation. thinking: the answer begins inside a `<think>` that the prompt opened."""

    ids: list[int]
    thinking: bool


def template_of(tokenizer: Tokenizer) -> str | None:
    """The checkpoint's template, R1's own where its tokens are known, or None: not a chat model."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return R1_TEMPLATE if {R1_ASSISTANT, "<｜User｜>", THINK} <= tokenizer.control.keys() else None


def needed_template(tokenizer: Tokenizer, name: str, hint: str) -> str:
    """The template of the model `name`, tried out. UsageError with the hint where it has none."""
    template = template_of(tokenizer)
    if template is None:
        raise UsageError(f"{name} has no chat template.", hint)
    check_template(template)
    return template


def check_template(template: str) -> None:
    """BadArtefact where the template does not compile, escapes the sandbox or runs past its limits."""
    try:
        render(template, _variables(SAMPLE, None, True, "", ""))
    except TemplateError as error:
        raise BadArtefact(f"The chat template is refused: {error}.", "Repair or remove it.") from error


def render_ids(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of `chat_prompt`."""
    return chat_prompt(tokenizer, template, messages, tools, add_generation_prompt).ids


def chat_prompt(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    thinking: bool = True,
) -> Prompt:
    """The prompt of a conversation. RequestError where the template refuses it or runs past a limit.

    Control tokens in messages and tools are masked before the template sees them, and encoded as text.
    Without `thinking` a model that reasons begins after an empty reasoning, and so answers at once.
    """
    mask = Mask(tokenizer)
    masked = [mask.message(_prepared(message, template)) for message in messages]
    bos, eos = _first(tokenizer, tokenizer.bos), _first(tokenizer, *tokenizer.eos_ids)
    try:
        variables = _variables(masked, mask.value(tools), add_generation_prompt, bos, eos)
        text = render(template, variables)
    except TemplateError as error:
        raise RequestError(f"The chat template refuses this conversation: {error}.", param="messages") from error
    if add_generation_prompt:
        text = _begun(text, THINK in tokenizer.control, thinking)
    return Prompt(mask.encode(text), add_generation_prompt and text.rstrip().endswith(THINK))


def _begun(text: str, reasons: bool, thinking: bool) -> str:
    """The rendered prompt with the answer's beginning; `reasons`: whether the model has reasoning tags.

    It stays one text until it is encoded: appended ids would miss merges across the line ends.
    """
    opened = text.rstrip().endswith(THINK)
    if thinking:  # without the tag R1 sometimes skips its reasoning
        return f"{text}{THINK}\n" if reasons and text.endswith(R1_ASSISTANT) else text
    if opened:
        text = text.rstrip().removesuffix(THINK)
    return text + NO_THOUGHT if opened or reasons else text


class Mask:
    """Replaces control tokens in people's text by digits that nobody can guess, and encodes them as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.nonce = str(secrets.randbits(128)).zfill(39)
        self.pieces: list[str] = []

    def text(self, text: str) -> str:
        if not self.tokenizer.control_in(text):
            return text
        parts = self.tokenizer.split_control(text)
        return "".join(self._mark(p) if i % 2 or self.tokenizer.control_in(p) else p for i, p in enumerate(parts))

    def _mark(self, piece: str) -> str:
        self.pieces.append(piece)
        return f"{self.nonce}{len(self.pieces) - 1:08d}"

    def value(self, value: Any) -> Any:
        """The same value with every string in it masked, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(k)): self.value(v) for k, v in value.items()}
        return [self.value(v) for v in value] if isinstance(value, list) else value

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        return {key: value if key == "role" else self.value(value) for key, value in message.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of the rendered prompt: its own control tokens are control, the masked ones are text."""
        parts = re.split(self.nonce + r"(\d{8})", text)
        ids = self.tokenizer.encode_prompt(parts[0])
        for index, rest in zip(parts[1::2], parts[2::2], strict=True):
            ids += self.tokenizer.encode(self.pieces[int(index)], control=False)
            ids += self.tokenizer.encode(rest, control=True)
        return ids


def _variables(
    messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, bos: str, eos: str
) -> dict[str, Any]:
    return {
        "messages": messages,
        "tools": tools or None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos,
        "eos_token": eos,
    }


def _first(tokenizer: Tokenizer, *ids: int | None) -> str:
    """The text of the first id that there is; empty where a tokenizer names none."""
    return next((tokenizer.token_text(id) for id in ids if id is not None), "")


def _prepared(message: dict[str, Any], template: str) -> dict[str, Any]:
    """A message as templates expect it: one string of content, no earlier reasoning, known role names."""
    message = {k: v for k, v in message.items() if v is not None and k not in ("reasoning", "reasoning_content")}
    message.setdefault("content", "")
    if message["role"] == "developer":
        message["role"] = "system"
    if message["role"] == "assistant":
        message["content"] = message["content"].rpartition(END_THINK)[2]
    if "tool_calls" in message:
        message["tool_calls"] = [_prepared_call(c, template) for c in message["tool_calls"]]
    return message


def _prepared_call(call: dict[str, Any], template: str) -> dict[str, Any]:
    """Templates that write arguments as JSON themselves take an object; R1's takes OpenAI's string."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise RequestError("A tool call has a function with name and arguments.", param="messages")
    if re.search(r"arguments\s*\|\s*tojson", template) and isinstance(function.get("arguments"), str):
        try:
            function = {**function, "arguments": json.loads(function["arguments"] or "{}")}
        except (ValueError, RecursionError) as error:
            raise RequestError("A tool call's arguments are not JSON.", param="messages") from error
    return {**call, "function": function}
