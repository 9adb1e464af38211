"""What would make the first requests on a GPU slow happens at load: kernels are compiled and decode passes captured.

By passes of token 0, of each size that requests make, in the cache's first blocks, which nobody reads before a request
writes them.
"""

from __future__ import annotations

from time import perf_counter

from ..events import emit
from ..ops import triton as cuda
from ..parallel.messages import Pass
from ..plan.plan import Plan
from .graphs import ROWS, bucket
from .part import ROWS as WIDEST
from .runner import Runner

SHORT = 8  # tokens up to which kernels for few tokens are one; then they differ by powers of two
QUIET = 1.0  # seconds that it may take without a word: kernels that were compiled once are found on disk


def compiles(runner: Runner) -> bool:
    """Whether kernels are compiled for this device while it computes."""
    return runner.device.type == "cuda" and not cuda.why_missing()


def sizes(plan: Plan) -> list[tuple[int, bool]]:
    """(tokens, whether they are a prompt's) of each pass that has kernels, or a graph, of its own."""
    batch = min(plan.limits.batch, WIDEST["cuda"])
    rows = {min(1 << i, batch) for i in range(bucket(min(batch, ROWS)).bit_length())} | {batch}
    longest = min(plan.limits.chunk, plan.limits.context, plan.kv.blocks * plan.kv.block_size)
    prompts = {min(SHORT << i, longest) for i in range(4)} | {longest}
    return [*((n, False) for n in sorted(rows)), *((n, True) for n in sorted(prompts))]


def passed(tokens: int, prefill: bool, size: int) -> Pass:
    """A prompt of that many tokens in blocks of `size`, or rows at the beginning of one block."""
    if prefill:
        places, blocks = list(range(tokens)), list(range(-(-tokens // size)))
        return Pass([0] * tokens, places, places, [blocks], [tokens], True, [tokens - 1])
    zeros = [0] * tokens
    return Pass(zeros, zeros, zeros, [[0]] * tokens, [1] * tokens, False, list(range(tokens)))


def last_row(context: int, size: int) -> Pass:
    """A row that ends a context of that many tokens, all of them in the first block of `size`."""
    return Pass([0], [context - 1], [0], [[0] * -(-context // size)], [context], False, [0])


def warm(runner: Runner) -> None:
    """Makes those passes, before there is a request; rows twice, since a graph is captured the second time. Then one
    of the longest context, which has kernels of its own."""
    todo, began = sizes(runner.plan), perf_counter()
    for done, (tokens, prefill) in enumerate(todo):
        if perf_counter() - began > QUIET:
            emit("engine.compiling", done=done, total=len(todo))
        for _ in range(1 if prefill else 2):
            runner.through(passed(tokens, prefill, runner.size))
    runner.through(last_row(runner.plan.limits.context, runner.size))
