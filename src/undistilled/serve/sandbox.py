"""The process that renders chat templates, which nobody trusts: `python -m undistilled.serve.sandbox`.

Jinja's sandbox keeps a template from Python's insides, and filters and string methods are a list of known ones.
Time and memory are the kernel's to limit: a signal's default action and an address space (see `renderer.py`).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .renderer import MAX_MEMORY, MAX_OUTPUT, pack

_FILTERS = (
    "abs capitalize count default d dictsort e escape first float groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper "
)
_STR_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
)
FILTERS, STR_METHODS = frozenset(_FILTERS.split()), frozenset(_STR_METHODS.split())


class Refusal(Exception):
    """What a template says with `raise_exception`, or is told here."""


def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers': plain JSON, not escaped for HTML."""
    known = {k: v for k, v in options.items() if k in ("separators", "sort_keys")}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


def _refuse(message: str) -> None:
    raise Refusal(message)


class Generation(Extension):
    """`{% generation %}`, which transformers uses to mark an assistant's tokens: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox. Names, filters and methods that no chat template needs are not there."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, cache_size=0, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        self.filters = {name: f for name, f in self.filters.items() if name in FILTERS} | {"tojson": tojson}
        self.globals = {
            "namespace": self.globals["namespace"],
            "range": range,
            "dict": dict,
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STR_METHODS:
            return False
        if isinstance(obj, (int, float, bytes)) and callable(value):
            return False
        return super().is_safe_attribute(obj, attr, value)


ENVIRONMENT = Environment()


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


def rendered(source: str, variables: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in compiled(source).generate(variables):
        size += len(part)
        if size > MAX_OUTPUT:
            raise Refusal(f"it writes more than {MAX_OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


def answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """The text, or the error in words. What is out of memory ends the process."""
    try:
        return {"text": rendered(source, variables)}
    except MemoryError:
        os._exit(1)
    except Refusal as error:
        return {"error": str(error)[:1000]}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except Exception as error:  # a template can raise anything
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    """Answer lines until there are no more: the pipe ends with the process that holds its other end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a signal to the group is not about this process
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends a process that does not handle it
        reply = answer(request["source"], request["variables"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(pack(reply))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
