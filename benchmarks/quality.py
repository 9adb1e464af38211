"""The table of docs/quality.md: KL divergence and accuracy of a model's compressed forms, by bytes.

    python benchmarks/quality.py MODEL FOLDER [--schemes int8 int4 ...] [--equal] [--bits 4 3 2.5] [--suite 25]
                                 [--tasks FILE ...] [--limit 500] [--tokens 4096] [--dtype float32] [--jobs 4]
                                 [--calibrate FILE] [--traces 0] [--peers FILE] [--json OUT] [--markdown OUT]

Each form is made by `undistilled quantize` and proven against MODEL by `undistilled prove`; both are kept in FOLDER for
the next run. Uniform schemes and budgets go through the same solver and one calibration. --equal also shares out the
very bytes of each uniform scheme. Forms are made --jobs at a time, for a GPU that one process does not fill. --peers
takes rows that llama_forms.py wrote for the same model and text into the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from undistilled import show_quality
from undistilled.prove.compare import rows

UNIFORM = ["int8", "int6-g64", "int4-g64", "nl4-g64", "int3-g64", "nl3-g64", "nl2-g64"]


def run(*argv: object) -> dict:
    """An undistilled command's JSON."""
    command = [sys.executable, "-m", "undistilled", *map(str, argv), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Table:
    """What is made of `model`, into `folder`, and what is asked of each form."""

    model: str
    folder: Path
    quantize: list  # options of every form
    prove: list

    def receipts(self, name: str, options: list, equal: bool) -> list[Path]:
        """The receipt of a form and, if `equal`, of the budget of its bytes."""
        size = self.made(name, options)
        found = [self.proven(name)]
        if equal:
            self.made(f"bytes-of-{name}", ["--bytes", size])
            found.append(self.proven(f"bytes-of-{name}"))
        return found

    def made(self, name: str, options: list) -> int:
        """The bytes of a form, which is made where it is not there."""
        out, note = self.folder / name, self.folder / f"{name}.json"
        if not out.exists():
            made = run("quantize", self.model, out, *options, *self.quantize)
            print(f"{name} made in {made['seconds']:.0f} s", file=sys.stderr, flush=True)
            note.write_text(json.dumps(made))
        return json.loads(note.read_text())["bytes"]

    def proven(self, name: str) -> Path:
        receipt = self.folder / f"receipt-{name}.json"
        if not receipt.exists():
            run("prove", self.folder / name, "--original", self.model, "-o", receipt, *self.prove)
        print(f"{name} done", file=sys.stderr, flush=True)
        return receipt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemes", nargs="*", default=UNIFORM)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--bits", nargs="*", type=float, default=[8.0, 6.0, 4.0, 3.0, 2.5])
    parser.add_argument("--suite", type=int, help="held-out reasoning questions of each task")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[])
    parser.add_argument("--limit", type=int, help="questions of each task file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", help="of products, so that forms differ by their weights alone")
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--traces", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    table = Table(args.model, args.folder, quantize_options(args), prove_options(args))
    forms = [(f"{b:g}-bits", ["--bits", b], False) for b in args.bits]
    forms += [(s, ["--scheme", s], args.equal) for s in args.schemes]
    receipts = table.receipts(*forms[0])  # leaves the calibration that the others share
    with ThreadPoolExecutor(args.jobs) as pool:
        receipts += [r for found in pool.map(lambda form: table.receipts(*form), forms[1:]) for r in found]
    found = rows(receipts)
    show_quality.compared(found, None)
    if args.peers:
        found = sorted(found + json.loads(args.peers.read_text()), key=lambda row: row["bytes"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(found))


def markdown(found: list[dict]) -> str:
    """The rows as a table, largest first."""
    lines = ["| form | MB | bits | KL, nats | same first choice |", "|---|---|---|---|---|"]
    for row in reversed(found):
        size = f"{row['bytes'] / 1e6:.2f} | {row['bits_per_weight']:.3f}"
        kl = f"{row['kl_nats']:.5f} ± {row['kl_se']:.5f}"
        lines.append(f"| {row['name'].removeprefix('receipt-')} | {size} | {kl} | {row['top1_agreement']:.1%} |")
    return "\n".join(lines) + "\n"


def quantize_options(args: argparse.Namespace) -> list:
    options = ["--solver", args.solver, "--calibration", args.folder / "calibration"]
    options += ["--text", args.calibrate] if args.calibrate else []
    return options + (["--traces", args.traces] if args.traces is not None else [])


def prove_options(args: argparse.Namespace) -> list:
    options: list = ["--no-speed", "--tokens", args.tokens, "--dtype", args.dtype]
    for task in args.tasks:
        options += ["--tasks", task]
    if args.suite:
        options += ["--suite"]
    limit = args.suite or args.limit
    return options + (["--limit", limit] if limit else [])


if __name__ == "__main__":
    main()
