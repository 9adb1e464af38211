"""Jinja2 for templates that nobody trusts: a sandbox with limits on time, memory and output.

Every operation that can make something large asks a `Budget` first, filters and string methods are a list
of known ones, and a trace function looks at the clock while the template's own code runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from operator import add, mul
from time import thread_time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 256 * 1024  # characters of a template
MAX_SPENT = 64 * 1024 * 1024  # characters and items that one rendering may make
COMPARED = 16  # characters that a search compares while one is made; 10^9 of them take a second
MAX_OUTPUT = 8 * 1024 * 1024  # characters of a rendered prompt
MAX_ITEMS = 100_000  # nodes of a value that is printed, or steps of ranges in one rendering
MAX_INTEGER = 1 << 128
MAX_SECONDS = 2.0  # CPU time of the thread

_FILTERS = (
    "abs capitalize count default d dictsort e escape first float groupby indent int items last length list "
    "lower map max min reject rejectattr replace safe select selectattr sort title trim unique upper "
)
_STR_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
)
FILTERS, STR_METHODS = frozenset(_FILTERS.split()), frozenset(_STR_METHODS.split())


class TemplateError(Exception):
    """A template does not compile, asks for what it may not have, or runs past a limit."""


class Budget:
    """What one rendering may still make, and until when."""

    def __init__(self, seconds: float) -> None:
        self.left, self.steps = MAX_SPENT, MAX_ITEMS
        self.until, self.ticks = thread_time() + seconds, 0

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TemplateError("it makes too much text")

    def search(self, text: str, *needles: Any) -> None:
        """Pay for one C call, which no clock interrupts: some compare every needle at every place of the text."""
        sizes = [len(n) for needle in needles for n in (needle if isinstance(needle, tuple) else (needle,))
                 if isinstance(n, str)]
        self.spend(len(text) * sum(sizes) // COMPARED)

    def range(self, *args: int) -> range:
        made = range(*args)
        if len(made) > self.steps:
            raise TemplateError("it counts too far")
        self.steps -= len(made)
        return made

    def tick(self, frame: Any, event: str, argument: Any) -> Any:
        """A trace function: a loop that emits nothing still runs lines of the template's code."""
        self.ticks += 1
        if self.ticks % 16 == 0 and thread_time() > self.until:
            sys.settrace(None)
            raise TemplateError("it takes too long")
        return self.tick if frame.f_code.co_filename in _TRACED else None


_TRACED = ("<template>", __file__)
_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(seconds: float = MAX_SECONDS) -> Iterator[Budget]:
    """Within the block, Python code started in this thread stays within a budget. Raises TemplateError only."""
    budget = Budget(seconds)
    token, before = _budget.set(budget), sys.gettrace()
    try:
        sys.settrace(budget.tick)
        yield budget
    except TemplateError:
        raise
    except RecursionError as error:
        raise TemplateError("it nests too deeply") from error
    except Exception as error:  # a template can raise anything
        raise TemplateError(f"{type(error).__name__}: {str(error)[:500]}") from error
    finally:
        sys.settrace(before)
        _budget.reset(token)


def check_size(value: Any) -> Any:
    """The value, if printing it is affordable: shared lists can be exponentially long when written out."""
    if isinstance(value, (list, tuple, dict)):
        count, stack = 0, [value]
        while stack:
            top = stack.pop()
            children = [*top.keys(), *top.values()] if isinstance(top, dict) else top
            count += len(children)
            if count > MAX_ITEMS:
                raise TemplateError("it prints too large a value")
            stack += [c for c in children if isinstance(c, (list, tuple, dict))]
            _budget.get().spend(sum(len(c) for c in children if isinstance(c, str)))
    return value


def concat(parts: Iterable[Any]) -> str:
    texts = [str(check_size(part)) for part in parts]
    _budget.get().spend(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _budget.get().search(text, old)
    _budget.get().spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _trim(value: Any, chars: str | None = None) -> str:
    text = str(check_size(value))
    _budget.get().search(text, chars)
    return text.strip(chars)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = [v[attribute] for v in value] if attribute is not None else list(value)
    _budget.get().spend(len(items) * len(str(d)))
    return concat([p for i, v in enumerate(items) for p in ((d, v) if i else (v,))])


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if isinstance(width, int) and width > 1000:
        raise TemplateError("it indents too far")
    pad = width if isinstance(width, str) else " " * width
    lines = str(text).splitlines()
    _budget.get().spend(len(text) + len(lines) * len(pad))
    return "\n".join(pad + s if (s or blank) and (i or first) else s for i, s in enumerate(lines))


def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers': plain JSON, not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError("it indents too far")
    known = {k: v for k, v in options.items() if k in ("separators", "sort_keys")}
    text = json.dumps(check_size(value), ensure_ascii=ensure_ascii, indent=indent, **known)
    _budget.get().spend(len(text))
    return text


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        _budget.get().spend(len(left) + len(right))
    return add(left, right)


def _times(left: Any, right: Any) -> Any:
    for value, other in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(other, int):
            _budget.get().spend(len(value) * max(other, 0))
    return _number(mul(left, right))


def _power(left: Any, right: Any) -> Any:
    if not (isinstance(right, (int, float)) and abs(right) <= 64 and isinstance(left, (int, float))):
        raise TemplateError("it raises to too high a power")
    return _number(left**right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        raise TemplateError("it formats with %")
    return left % right


def _number(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise TemplateError("it makes too large a number")
    return value


class Generation(Extension):
    """`{% generation %}`, which transformers uses to mark an assistant's tokens: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox. Names, filters and methods that no chat template needs are not there."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0, finalize=check_size,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        own: dict[str, Callable[..., Any]] = {
            "replace": _replace, "join": _join, "indent": _indent, "tojson": tojson, "trim": _trim,
            "string": lambda value: concat([value]), "reverse": lambda value: value[::-1],
        }
        self.filters = {name: f for name, f in self.filters.items() if name in FILTERS} | own
        self.globals = {
            "namespace": self.globals["namespace"],
            "dict": dict,
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form[:100]),
        }
        self.binop_table |= {"+": _plus, "*": _times, "**": _power, "%": _modulo}

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return None  # str.format is no attribute here, so there is nothing to wrap

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STR_METHODS:
            return False
        if isinstance(obj, (int, float, bytes)) and callable(value):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args)
        if isinstance(owner, str) and name == "join":
            return _join(args[0], owner)
        if isinstance(owner, str):
            _budget.get().spend(len(owner) if "split" in name else 0)
            _budget.get().search(owner, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


ENVIRONMENT = Environment()


def compile_template(source: str) -> jinja2.Template:
    """The compiled template. TemplateError where it is too long, malformed, or uses an unknown filter."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"it is longer than {MAX_SOURCE} characters")
    with limited():
        template = ENVIRONMENT.from_string(source)
    names = template.root_render_func.__globals__
    names.update(concat=concat, str_join=concat, markup_join=concat)  # `~`, macros and captured blocks
    return template


def render(template: jinja2.Template, variables: dict[str, Any], seconds: float = MAX_SECONDS) -> str:
    """The template's text. TemplateError past any limit, or whatever the template raises."""
    with limited(seconds) as budget:
        context = template.new_context({**variables, "range": budget.range})
        parts, size = [], 0
        for part in template.root_render_func(context):
            size += len(part)
            if size > MAX_OUTPUT:
                raise TemplateError(f"it writes more than {MAX_OUTPUT} characters")
            parts.append(part)
        return "".join(parts)
    raise AssertionError
