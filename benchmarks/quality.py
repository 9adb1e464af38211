"""The table of docs/quality.md: KL divergence and accuracy of a model's compressed forms, by bytes.

    python benchmarks/quality.py MODEL FOLDER [--schemes int8 int4 ...] [--equal] [--bits 4 3 2.5] [--suite 25]
                                 [--tasks FILE ...] [--tokens 4096] [--calibrate FILE] [--json OUT]

Each form is made by `undistilled quantize` (kept in FOLDER for the next run) and proven against MODEL by
`undistilled prove`; uniform schemes and budgets go through the same solver and calibration. --equal also shares out the
very bytes of each uniform scheme.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from undistilled import show_quality
from undistilled.prove.compare import rows


def run(*argv: object) -> dict:
    """An undistilled command's JSON."""
    command = [sys.executable, "-m", "undistilled", *map(str, argv), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


def made(model: str, folder: Path, name: str, options: list, calibrate: list) -> tuple[Path, int]:
    """The folder of a form, and its bytes."""
    out, note = folder / name, folder / f"{name}.json"
    if not out.exists():
        note.write_text(json.dumps(run("quantize", model, out, *options, *calibrate)))
    return out, json.loads(note.read_text())["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    uniform = ["int8", "int6", "int4", "nl4-g64", "int3", "nl3-g64", "nl2-g64"]
    parser.add_argument("--schemes", nargs="*", default=uniform)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--bits", nargs="*", type=float, default=[8.0, 6.0, 4.0, 3.0, 2.5])
    parser.add_argument("--suite", type=int, help="held-out reasoning questions of each task")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    calibrate = ["--text", args.calibrate] if args.calibrate else []
    asked = ["--tokens", args.tokens]
    for task in args.tasks:
        asked += ["--tasks", task]
    if args.suite:
        asked += ["--suite", "--limit", args.suite]
    forms = [(s, ["--scheme", s]) for s in args.schemes] + [(f"{b:g}-bits", ["--bits", b]) for b in args.bits]
    receipts = []
    while forms:
        name, options = forms.pop(0)
        out, size = made(args.model, args.folder, name, options, calibrate)
        if args.equal and options[0] == "--scheme":
            forms.insert(0, (f"bytes-of-{name}", ["--bytes", size]))
        receipts.append(args.folder / f"receipt-{name}.json")
        run("prove", out, "--original", args.model, "--dtype", "float32", "-o", receipts[-1], *asked)
        print(f"{name} done", file=sys.stderr, flush=True)
    found = rows(receipts)
    show_quality.compared(found, None)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
