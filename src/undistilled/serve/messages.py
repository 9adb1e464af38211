"""What the server and the engine's process say to each other: MessagePack, checked against these types."""

from __future__ import annotations

from typing import Any

import msgspec

from ..schedule.request import Output, Request


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    id: str


class Stop(msgspec.Struct, tag=True):
    """The engine's process ends."""


class Loading(msgspec.Struct, tag=True):
    """done, total: bytes."""

    done: int
    total: int
    name: str


class Ready(msgspec.Struct, tag=True):
    """vocab: rows of the output head; ranks: processes, the engine's is the first; tokenizer:
    `Tokenizer.dump()`."""

    name: str
    max_context: int
    vocab: int
    ranks: int
    tokenizer: dict[str, Any]


class Failed(msgspec.Struct, tag=True):
    """The engine did not open. kind: the name of a class in `errors`."""

    kind: str
    message: str
    hint: str = ""


class Refused(msgspec.Struct):
    """A RequestError, by the id of its request."""

    id: str
    message: str
    status: int = 400
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class News(msgspec.Struct, tag=True):
    """What one turn of the engine brought."""

    outputs: list[Output] = []
    accepted: list[str] = []
    refused: list[Refused] = []
    stats: dict[str, float] = {}


Command = Add | Abort | Stop
Report = Loading | Ready | Failed | News
