"""Our CPU kernels at R1's widths, one token: the share of this machine's memory bandwidth that they reach.

    PYTHONPATH=src python benchmarks/cpu_kernels.py [--only int8 fp8_block] [--threads N] [--rounds 5] [--json OUT]

Every call takes another copy of its weight (or other experts), all of them larger than the caches together. Calls are
recorded and run as a decode pass is, with a barrier around each (`bench --explain`'s way). A round is a read of a large
array by the same threads, then each copy once: shares are round by round, and what is printed are medians with the
least and most. mix64 is dynamic blocks, see random_weights.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from random_weights import PAGES, random_weight
from undistilled import scheme as schemes
from undistilled.ops.cpu import native
from undistilled.ops.cpu.program import Arena, Program
from undistilled.ops.experts import experts
from undistilled.ops.linear import apply
from undistilled.plan.recipes import INTEGERS, products_of
from undistilled.scheme import Stored
from undistilled.scheme.across import Across

SHAPES = ((7168, 2048), (2048, 7168), (7168, 18432), (18432, 7168), (7168, 7168))  # outputs, inputs
HIDDEN, WIDTH, EXPERTS, CHOSEN = 7168, 2048, 16, 8
LINEARS, BANKS = ("int8", "int4", "fp8_block", "bf16"), ("int8", "int4", "fp8_block", "mix64")
CHECKED = 128  # outputs that are compared with float64
CELL = dict[str, object]


def cache_bytes() -> int:
    """Of the largest cache that a core sees."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def copies_of(nbytes: int) -> int:
    return max(2, -(-4 * cache_bytes() // nbytes))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls: list[Callable[[], object]], nbytes: int, memory: torch.Tensor, rounds: int) -> CELL:
    """Of calls that read nbytes each: microseconds, GB/s, and their share of what `memory` is read with."""
    program = Program(Arena())
    with program.recording():
        held = [call() for call in calls]  # what a step writes to must not be another's
    assert not program.foreign and len(program) == len(held), program.foreign
    program.run()
    seconds, shares, reads = [], [], []
    for _ in range(rounds):
        reads.append(memory.nbytes / timed(lambda: native.read(memory)))
        seconds.append(statistics.median(step.seconds for step in program.timed(1)))
        shares.append(nbytes / seconds[-1] / reads[-1])
    middle = statistics.median(seconds)
    spread = {"share": statistics.median(shares), "least": min(shares), "most": max(shares)}
    return {"bytes": nbytes, "us": middle * 1e6, "gb_per_s": nbytes / middle / 1e9, **spread,
            "read_gb_per_s": statistics.median(reads) / 1e9}  # fmt: skip


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def linear(scheme: str, outputs: int, inputs: int, products: str | None, memory: torch.Tensor, rounds: int) -> CELL:
    first = random_weight(scheme, outputs, inputs, device="cpu", products=products)
    weights = [first] + [copy_of(first) for _ in range(copies_of(first.nbytes) - 1)]
    x = torch.randn(1, inputs)
    exact = x.double() @ first.narrow("out", 0, CHECKED).dense(torch.float32).double().T
    off = error(apply(x, first)[:, :CHECKED], exact)
    cell = measure([lambda w=w: apply(x, w) for w in weights], first.nbytes, memory, rounds)
    return {"scheme": scheme, "what": f"{outputs} x {inputs}", "error": off, **cell}


def copy_of(weight: Stored) -> Stored:
    parts = {name: PAGES.empty(tuple(part.shape), part.dtype).copy_(part) for name, part in weight.parts.items()}
    return Stored(weight.scheme, weight.shape, parts, weight.products)


def bank(scheme: str, products: str | None, memory: torch.Tensor, rounds: int) -> CELL:
    shapes = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    gate, up, down = (random_weight(scheme, *shape, device="cpu", products=products) for shape in shapes)
    each = (gate.nbytes + up.nbytes + down.nbytes) // EXPERTS
    x, shares = torch.randn(1, HIDDEN) * 0.1, torch.rand(1, CHOSEN)
    halves = torch.arange(EXPERTS, dtype=torch.int32).view(-1, CHOSEN)
    run = experts.resolve(gate, x.dtype).run
    calls = [lambda i=i: run(x, i[None], shares, gate, up, down) for i in halves]
    reference = experts.reference.run(x, halves[:1].long(), shares, gate, up, down)
    off = error(calls[0](), reference.double())
    return {"scheme": scheme, "what": f"{CHOSEN} of {EXPERTS} experts", "error": off,
            **measure(calls * 2, CHOSEN * each, memory, rounds)}  # fmt: skip


def show(cell: CELL) -> CELL:
    print(
        f"{cell['scheme']:10} {cell['what']:16} {cell['bytes'] / 1e6:7.1f} MB {cell['us']:9.0f} us"
        f" {cell['gb_per_s']:6.1f} GB/s of {cell['read_gb_per_s']:5.1f}: {cell['share']:4.0%}"
        f" ({cell['least']:.0%} to {cell['most']:.0%})  {cell['error']:.0e} off",
        flush=True,
    )
    return cell


def usual(scheme: str) -> str:
    """What a plan whose large matrices all have this scheme multiplies in."""
    across = scheme in schemes.SCHEMES and Across.takes(schemes.get(scheme))
    return "int16" if across or not native.rounds() else "bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(dict.fromkeys(LINEARS + BANKS)), help="schemes")
    parser.add_argument("--what", nargs="*", choices=("linears", "experts"), default=["linears", "experts"])
    kinds = ("float32", "bfloat16", *INTEGERS)
    parser.add_argument("--products", choices=kinds, help="default: what a plan takes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    build = native.build()
    assert build, native.why_missing()
    torch.set_num_threads(args.threads)
    nbytes = max(512 << 20, 4 * cache_bytes()) // native.PIECE * native.PIECE
    memory = PAGES.empty((nbytes,), torch.uint8).fill_(1)
    print(f"kernels built for {build.name}, {args.products or 'auto'} products, {args.threads} threads", flush=True)
    cells = []
    with torch.inference_mode():
        for scheme in args.only:
            products = products_of("mlp.down", scheme, "cpu", args.products or usual(scheme))
            print(f"{scheme}: {products or 'float32'} products", flush=True)
            if scheme in LINEARS and "linears" in args.what:
                cells += [show(linear(scheme, *shape, products, memory, args.rounds)) for shape in SHAPES]
            if scheme in BANKS and "experts" in args.what:
                cells.append(show(bank(scheme, products, memory, args.rounds)))
    if args.json:
        said = {"build": build.name, "products": args.products or "auto", "cells": cells}
        args.json.write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
