"""Our CPU kernels on many rows at R1's widths: products of INT16 by tiles (AMX) and without, beside PyTorch's own.

    PYTHONPATH=src python benchmarks/cpu_prompts.py [--rows 32 128 512] [--rounds 3] [--threads N] [--json OUT]

Each round runs a process with tiles and one without (UNDISTILLED_AMX=off), in turns. TFLOP/s, two for each weight and
row, medians over rounds (least to most); "torch" is torch.nn.functional.linear of a dense copy, in BF16 and float32.
Experts: 32 of 2,048 x 7,168, eight a row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from random_weights import random_weight
from undistilled.ops.cpu import native
from undistilled.ops.experts import experts
from undistilled.ops.linear import apply

SCHEMES = ("int8", "int4")
SHAPES = ((7168, 7168), (2048, 7168), (7168, 2048))  # outputs, inputs
HIDDEN, WIDTH, EXPERTS, CHOSEN = 7168, 2048, 32, 8
CALLS, SECONDS = 3, 0.3  # of a cell, at least


def rate(call: Callable[[], object], flops: float) -> float:
    """TFLOP/s, by the median call."""
    call()
    taken: list[float] = []
    while len(taken) < CALLS or sum(taken) < SECONDS:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return flops / statistics.median(taken) / 1e12


def measure(rows: list[int], torch_too: bool) -> dict[str, float]:
    """{"what, rows": TFLOP/s} of this process."""
    found = {}
    for outputs, inputs in SHAPES:
        weights = {scheme: random_weight(scheme, outputs, inputs, device="cpu", products="int16") for scheme in SCHEMES}
        for m in rows:
            x, flops = torch.randn(m, inputs), 2.0 * m * outputs * inputs
            for scheme, weight in weights.items():
                key = f"{scheme} {outputs} x {inputs}, {m} rows"
                found[key] = rate(partial(apply, x, weight), flops)
            for dtype in (torch.bfloat16, torch.float32) if torch_too else ():
                dense, like = weights["int8"].dense(dtype), x.to(dtype)
                key = f"torch {str(dtype).removeprefix('torch.')} {outputs} x {inputs}, {m} rows"
                found[key] = rate(partial(torch.nn.functional.linear, like, dense), flops)
    shapes = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    for scheme in SCHEMES:
        bank = [random_weight(scheme, *shape, device="cpu", products="int16") for shape in shapes]
        run = experts.resolve(bank[0], torch.float32).run
        for m in rows:
            x, shares = torch.randn(m, HIDDEN) * 0.1, torch.rand(m, CHOSEN)
            ids = torch.rand(m, EXPERTS).argsort(-1)[:, :CHOSEN].to(torch.int32)
            flops = 6.0 * m * CHOSEN * WIDTH * HIDDEN
            call = partial(run, x, ids, shares, *bank)
            found[f"{scheme} experts, {m} rows"] = rate(call, flops)
    return found


def child(rows: list[int], threads: int, tiles: bool, torch_too: bool) -> dict[str, float]:
    env = os.environ | ({} if tiles else {"UNDISTILLED_AMX": "off"})
    command = [sys.executable, __file__, "--child", "--threads", str(threads), "--rows", *map(str, rows)]
    command += ["--torch"] if torch_too else []
    said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
    return json.loads(said.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(args.threads)
        with torch.inference_mode():
            print(json.dumps(measure(args.rows, args.torch)))
        return
    assert native.build(), native.why_missing()
    print(f"kernels built for {native.build().name}, tiles: {native.tiles()}, {args.threads} threads", flush=True)
    rounds = []
    for number in range(args.rounds):
        turns = (True, False) if number % 2 == 0 else (False, True)
        rounds.append({on: child(args.rows, args.threads, on, on and number == 0) for on in turns})
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    for key in rounds[0][True]:
        sides = [[r[on][key] for r in rounds if key in r[on]] for on in (True, False)]
        middle = [statistics.median(side) if side else None for side in sides]
        spread = [f"{m:6.3f} ({min(s):.3f} to {max(s):.3f})" if s else "" for m, s in zip(middle, sides, strict=True)]
        ratio = f"  x {middle[0] / middle[1]:.2f}" if all(middle) else ""
        print(f"{key:34} {spread[0]:26} {spread[1]:26}{ratio}")
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
