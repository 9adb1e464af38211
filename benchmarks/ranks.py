"""Several processes of one model on this machine: memory of each beside its plan, speed, idle time of stages.

python benchmarks/ranks.py [MODEL] [--scheme S] [--layouts tp2 pp2 tp2pp2 ep2] [--batch 4] [--microbatches 4]

`synthetic` is memory.py's DeepSeek-shaped model of 1.4 GB. With --slow N, stage N's layers take twice as long: the
plan is then rebalanced, and its speed compared with that of every other split nearby.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from memory import synthetic

SLOW = """
import sys, time
from undistilled.model.decoder import Block
forward = Block.forward
def slow(self, *args):
    began = time.perf_counter()
    out = forward(self, *args)
    time.sleep(time.perf_counter() - began)
    return out
Block.forward = slow
"""
SLOW_RANK = SLOW + "from undistilled.generate import rank\nsys.exit(rank.main())\n"
MAIN = "from undistilled.parallel import local\nfrom undistilled.cli import main\n{before}main()\n"


def undistilled(*arguments: str, slow: int | None = None) -> str:
    """What a verb prints. `slow`: which of two ranks takes twice as long over its layers."""
    before = {None: "", 0: SLOW, 1: "local.RANK = 'slow_rank'\n"}[slow]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "slow_rank.py").write_text(SLOW_RANK)
        env = os.environ | {"PYTHONPATH": folder + os.pathsep + os.environ.get("PYTHONPATH", "")}
        command = [sys.executable, "-c", MAIN.format(before=before), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def options(layout: str) -> list[str]:
    """ "tp2pp2" as options."""
    return [word for axis, count in re.findall(r"(tp|pp|ep)(\d+)", layout) for word in (f"--{axis}", count)]


def memory(model: str, args: argparse.Namespace) -> None:
    for layout in args.layouts:
        common = ["--device", "cpu", "--batch", str(args.batch)]
        common += ["--microbatches", str(args.microbatches)] if "pp" in layout else []
        common += ["--scheme", args.scheme] if args.scheme else []
        run = ["bench", model, *options(layout), *common, "--prompt-tokens", "512", "--new-tokens", "16"]
        found = json.loads(undistilled(*run, "--repeat", "2", "--json"))
        ratios = [row["peak_bytes"] / row["planned_bytes"] for row in found["ranks"]]
        peaks = ", ".join(f"{row['peak_bytes'] / 1e6:.0f} MB" for row in found["ranks"])
        speeds = [found[key]["median"] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        print(
            f"{layout}: {peaks}; measured / planned {min(ratios):.3f} to {max(ratios):.3f}; "
            f"prefill {speeds[0]:.0f}, decode {speeds[1]:.1f} tokens/s; stages idle {found['bubble']:.0%}",
            flush=True,
        )


def slow(model: str, args: argparse.Namespace) -> None:
    """Throughput of the even split, of what `rebalance` makes of it, and of the splits around that."""
    with tempfile.TemporaryDirectory() as folder:
        even, made = f"{folder}/even.json", f"{folder}/made.json"
        shape = ["--device", "cpu", "--pp", "2", "--batch", str(args.batch), "--microbatches", str(args.microbatches)]
        undistilled("plan", model, *shape, "--context", "256", "-o", even)
        undistilled("rebalance", model, "--plan", even, "-o", made, "--new-tokens", "48", slow=args.slow)
        last = json.loads(Path(even).read_text())["mesh"]["stages"][-1][1]
        chosen = json.loads(Path(made).read_text())["mesh"]["stages"][0][1]
        before = json.loads(Path(even).read_text())["mesh"]["stages"][0][1]
        speeds = {}
        for _ in range(3):
            for split in sorted({before, *range(max(1, chosen - 3), min(last - 1, chosen + 3) + 1)}):
                speeds.setdefault(split, []).append(decode(model, even, split, last, folder, args))
        best = max(max(v) for v in speeds.values())
        for split, found in speeds.items():
            note = " (rebalanced)" if split == chosen else " (as planned)" if split == before else ""
            print(f"{split} + {last - split} layers{note}: {', '.join(f'{v:.1f}' for v in found)} tokens/s")
        middle = {split: sorted(v)[1] for split, v in speeds.items()}
        share = middle[chosen] / max(middle.values())
        print(f"rebalanced / best split, medians: {share:.2f}; best seen {best:.1f}")


def decode(model: str, plan: str, split: int, last: int, folder: str, args: argparse.Namespace) -> float:
    """Decode tokens a second of the plan with `split` layers in its first stage."""
    from undistilled.checkpoint.resolve import find
    from undistilled.model.weights import counts
    from undistilled.plan.hardware import load_machine
    from undistilled.plan.plan import read_plan
    from undistilled.plan.solve import moved

    found, old = find(model), read_plan(Path(plan))
    mesh = old.mesh.model_copy(update={"stages": ((0, split), (split, last))})
    file = Path(folder) / "split.json"
    moved(old, mesh, found.spec, load_machine("this"), counts(found.spec)[1]).write(file)
    run = ["bench", model, "--plan", str(file), "--batch", str(args.batch)]
    run += ["--prompt-tokens", "64", "--new-tokens", "48", "--repeat", "1", "--json"]
    return json.loads(undistilled(*run, slow=args.slow))["decode_tokens_per_s"]["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="r1-nano")
    parser.add_argument("--scheme")
    parser.add_argument("--layouts", nargs="*", default=["tp2", "pp2", "tp2pp2", "ep2"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--slow", type=int)
    args = parser.parse_args()
    model = synthetic() if args.model == "synthetic" else args.model
    memory(model, args) if args.slow is None else slow(model, args)


if __name__ == "__main__":
    main()
