"""SmolLM2 on this CPU by several engines, in turn, each in a process and an environment of its own.

    python benchmarks/peers [--rounds 5] [--only "int8"] [--threads N] [--kl] [--json OUT]

Environments and models are made under --peers (default benchmarks/.peers) when they are first needed: llama.cpp is
built with -DGGML_NATIVE=ON, which takes minutes. All models are made from one BF16 original; our int4 keeps the head,
which is the embedding, in INT8; our q4_0 has llama.cpp's form of it all; "calibrated" is INT4 of it all as `quantize`
makes it; "a8" is --dtype int8. Rounds alternate engines, so that a drift of the machine meets them all; what counts are
the ratios, round by round. Rounds are added to those of the same engines and threads that --json holds already. --kl
compares next-token distributions with the original's instead, on 512 tokens of Persuasion.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from engines import ENGINES, ORIGINAL, RIVALS, logits, rates
from measured import PROMPT

Runs = dict[str, list[dict[str, float]]]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:,.{digits}f} ({value['min']:,.{digits}f} to {value['max']:,.{digits}f})"


def speeds(names: list[str], args: argparse.Namespace) -> dict:
    runs: Runs = {name: [] for name in names}
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        if before["threads"] != args.threads or list(before["runs"]) != names:
            raise SystemExit(f"{args.json} holds runs of other engines or threads: give another file.")
        runs = before["runs"]
    for number in range(args.rounds):
        for name in names:
            runs[name].append(rates(ENGINES[name], args.peers, args.threads))
            print(f"round {number + 1}: {name} {runs[name][-1]}", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"threads": args.threads, "runs": runs}))
    return summary(runs)


def summary(runs: Runs) -> dict:
    """Prints and returns the rates and, round by round, the ratios to rivals."""
    report: dict = {"runs": runs, "engines": {}, "ratios": {}}
    for name, found in runs.items():
        report["engines"][name] = {k: spread([f[k] for f in found]) for k in found[0]}
        print(f"| {name} |", *(f"{cell(v, 0)} |" for v in report["engines"][name].values()))
    for name, rival in ((a, b) for a in runs for b in RIVALS.get(a, ()) if b in runs):
        pairs = list(zip(runs[name], runs[rival], strict=True))
        ratio = {k: spread([a[k] / b[k] for a, b in pairs]) for k in pairs[0][0]}
        report["ratios"][f"{name} / {rival}"] = ratio
        print(f"| {name} / {rival} |", *(f"{cell(v, 2)} |" for v in ratio.values()))
    return report


def divergences(names: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Mean KL divergence from the original in nats, over the positions of the text."""
    import numpy

    from undistilled.checkpoint.resolve import find
    from undistilled.prove.inputs import read_text

    tokens = find("smollm2").tokenizer().encode(read_text(None)[1][: PROMPT * 64], control=False)[:PROMPT]

    def log_softmax(x):
        x = x.astype(numpy.float64)
        x -= x.max(-1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))

    exact = log_softmax(logits(ORIGINAL, args.peers, args.threads, tokens))
    found = {}
    for name in names:
        other = log_softmax(logits(ENGINES[name], args.peers, args.threads, tokens))
        found[name] = float((numpy.exp(exact) * (exact - other)).sum(-1).mean())
        print(f"| {name} | {found[name]:.5f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[""], help="engines whose names hold one of these")
    parser.add_argument("--peers", type=Path, default=Path(__file__).parents[1] / ".peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kl", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.peers.mkdir(parents=True, exist_ok=True)
    names = [name for name in ENGINES if any(part in name for part in args.only)]
    report = divergences(names, args) if args.kl else speeds(names, args)
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "threads": args.threads} | report, indent=1))


if __name__ == "__main__":
    main()
