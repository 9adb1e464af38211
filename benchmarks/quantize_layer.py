"""A layer of R1's widths (256 experts, FP8, 11.5 GB, random) through `quantize`: rate, peak memory, and R1's time.

    python benchmarks/quantize_layer.py [--gigabytes 11.6] [--bits 3.2] [--solver gptq] [--tokens 2048] [--device cpu]
                                        [--folder DIR] [--json OUT]

The layer is written first (and kept for the next run); --gigabytes takes fewer experts. `quantize` then runs in a fresh
process, whose peak is its own. Random weights make a calibration as long as a real one, and its moments meaningless.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from streaming import config_for, write_shard
from undistilled.checkpoint.resolve import find
from undistilled.model.spec import spec_from_config
from undistilled.model.weights import counts


def write_layer(folder: Path, gigabytes: float) -> None:
    """A model of one layer, with r1-nano's tokenizer."""
    nano = find("r1-nano")
    write_shard(folder, config_for(gigabytes, nano.spec.vocab))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano.path / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=11.6)
    parser.add_argument("--bits", type=float, default=3.2)
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".peers" / "r1-layer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = args.folder / f"layer-{args.gigabytes:g}"
    if not (source / "model.safetensors").exists():
        write_layer(source, args.gigabytes)
    out = args.folder / "out"
    for left in (out, args.folder / "out.partial"):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-m", "undistilled", "quantize", str(source), str(out), "--bits", str(args.bits)]
    command += ["--solver", args.solver, "--tokens", str(args.tokens), "--traces", "0", "--json"]
    command += ["--device", args.device] if args.device else []
    began = perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = perf_counter() - began
    size = (source / "model.safetensors").stat().st_size
    layer, whole = counts(spec_from_config(find(str(source)).config))[0], counts(find("deepseek-r1").spec)[0]
    found = json.loads(done.stdout) | {
        "read_bytes": size,
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "r1_hours": seconds * whole / layer / 3600,
        "solver": args.solver,
    }
    print(
        f"{args.solver}, {args.bits} bits: {size / 1e9:.2f} GB in {seconds:.0f} s, {found['gb_per_s']:.3f} GB/s; "
        f"peak {found['peak_bytes'] / 1e9:.2f} GB; R1 by parameters {found['r1_hours']:.1f} h"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
