"""SmolLM2 on this CPU: ours, llama.cpp and transformers, in turn, each in a process of its own.

    python benchmarks/cpu_peers.py [--rounds 5] [--peers DIR] [--json OUT]

llama.cpp comes as llama-cpp-python, built with -DGGML_NATIVE=ON in an environment of its own under DIR
(default benchmarks/.peers; building takes minutes). All three read weights made from the same GGUF file:
BF16 as we dequantise it, and Q8_0 and Q4_0 from that; our int4 keeps the head, which is the embedding, in INT8, their
Q4_0 file has it in 4 bits too. Rounds alternate engines, so that a drift of the machine meets them all; what counts are
the ratios, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PROMPT, NEW = 512, 64

LLAMA = """
import json, sys, time
from llama_cpp import Llama
m = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads={threads}, n_threads_batch={threads}, verbose=False)
def run(prompt, new):
    m.reset(); t = time.perf_counter(); m.eval(prompt); first = time.perf_counter()
    for i in range(new): m.eval([100 + i])
    return len(prompt) / (first - t), new / (time.perf_counter() - first)
run(list(range(100, 164)), 4)
p, d = run([(i * 7919) % 32000 for i in range({prompt})], {new})
print(json.dumps(dict(prefill=p, decode=d)))
"""

TRANSFORMERS = """
import json, sys, time, torch, transformers
torch.set_num_threads({threads})
m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
ids = torch.tensor([[(i * 7919) % 32000 for i in range({prompt})]])
def run(ids, new):
    t = time.perf_counter()
    with torch.inference_mode():
        m.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=2)
    return time.perf_counter() - t
run(ids[:, :64], 4)
one, many = run(ids, 1), run(ids, {new} + 1)
print(json.dumps(dict(prefill={prompt} / one, decode={new} / (many - one))))
"""


def make_models(folder: Path) -> None:
    """BF16, Q8_0 and Q4_0 GGUF files, and a transformers folder, from the demo model's dequantised weights."""
    import gguf
    import torch
    from safetensors.torch import save_file

    from undistilled.checkpoint.resolve import find

    model = find("smollm2")
    reader = gguf.GGUFReader(model.path)
    for kind in ("BF16", "Q8_0", "Q4_0"):
        path = folder / f"smollm2-{kind}.gguf"
        if not path.exists():
            write_gguf(gguf, reader, getattr(gguf.GGMLQuantizationType, kind), path)
    plain = folder / "transformers"
    if not plain.exists():
        plain.mkdir(parents=True)
        source = model.source()
        state = {n: source.dense(n, 0, source.shape(n)[0]).to(torch.bfloat16) for n in source.names()}
        config = {k: v for k, v in model.config.items() if not k.startswith("gguf")}
        (plain / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
        save_file(state, plain / "model.safetensors", metadata={"format": "pt"})


def write_gguf(gguf, reader, kind, path: Path) -> None:
    """The same file with its matrices as `kind`; BF16 rounding first, so that all engines start from one model."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        rounded = gguf.quants.quantize(data, bf16)
        stored = rounded if kind == bf16 else gguf.quants.quantize(gguf.quants.dequantize(rounded, bf16), kind)
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)


def llama_python(folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python, built here where there is none."""
    python = folder / "llama" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "llama"], check=True)
        environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        subprocess.run([python, "-m", "pip", "install", "-q", "llama-cpp-python", "numpy"], check=True, env=environment)
    return python


def figure(argv: list) -> dict[str, float]:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{argv[0]} failed: {done.stderr[-800:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def engines(folder: Path, threads: int) -> dict:
    """Name -> a call that measures one round."""
    python, fill = llama_python(folder), {"threads": threads, "prompt": PROMPT, "new": NEW}
    llama = LLAMA.replace("{", "\0").replace("\0threads}", str(threads))
    for key, value in fill.items():
        llama = llama.replace("\0" + key + "}", str(value))
    llama = llama.replace("\0", "{")
    theirs = TRANSFORMERS
    for key, value in fill.items():
        theirs = theirs.replace("{" + key + "}", str(value))

    def ours(scheme: str) -> dict[str, float]:
        command = [sys.executable, "-m", "undistilled", "bench", "smollm2", "--scheme", scheme, "--json"]
        found = figure([*command, "--prompt-tokens", PROMPT, "--new-tokens", NEW + 1, "--repeat", 1])
        return {k: found[f"{k}_tokens_per_s"]["median"] for k in ("prefill", "decode")}

    return {
        "ours bf16": lambda: ours("bf16"),
        "llama.cpp BF16": lambda: figure([python, "-c", llama, folder / "smollm2-BF16.gguf"]),
        "transformers bf16": lambda: figure([sys.executable, "-c", theirs, folder / "transformers", "bfloat16"]),
        "transformers fp32": lambda: figure([sys.executable, "-c", theirs, folder / "transformers", "float32"]),
        "ours int8": lambda: ours("int8"),
        "llama.cpp Q8_0": lambda: figure([python, "-c", llama, folder / "smollm2-Q8_0.gguf"]),
        "ours int4": lambda: ours("int4"),
        "llama.cpp Q4_0": lambda: figure([python, "-c", llama, folder / "smollm2-Q4_0.gguf"]),
    }


RATIOS = [
    ("ours bf16", "llama.cpp BF16"),
    ("ours bf16", "transformers bf16"),
    ("ours bf16", "transformers fp32"),
    ("ours int8", "llama.cpp Q8_0"),
    ("ours int8", "transformers bf16"),
    ("ours int8", "transformers fp32"),
    ("ours int4", "llama.cpp Q4_0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(__file__).parent / ".peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.peers.mkdir(parents=True, exist_ok=True)
    make_models(args.peers)
    runs: dict[str, list[dict[str, float]]] = {}
    calls = engines(args.peers, args.threads)
    for number in range(args.rounds):
        for name, call in calls.items():
            runs.setdefault(name, []).append(call())
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    report: dict = {"load": os.getloadavg(), "engines": {}, "ratios": {}}
    for name, found in runs.items():
        report["engines"][name] = {k: spread([f[k] for f in found]) for k in ("prefill", "decode")}
        print(f"{name:20s}", *(f"{k} {cell(v)}" for k, v in report["engines"][name].items()), sep="  ")
    for a, b in RATIOS:
        ratio = {k: spread([x[k] / y[k] for x, y in zip(runs[a], runs[b], strict=True)]) for k in ("prefill", "decode")}
        report["ratios"][f"{a} / {b}"] = ratio
        print(f"{a} / {b}:", *(f"{k} {cell(v, 2)}" for k, v in ratio.items()), sep="  ")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(value: dict[str, float], digits: int = 1) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


if __name__ == "__main__":
    main()
