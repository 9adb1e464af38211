"""llama.cpp's quantisations of SmolLM2, measured by our ruler: bytes in the file, and `undistilled prove` of each.

    python benchmarks/llama_forms.py FOLDER [--shuffle] [--types Q4_K_M down:IQ4_XS ...] [--tokens 4096]
                                     [--calibrate FILE] [--calibration-tokens 8192] [--check Q4_K_M ...]
                                     [--llama FOLDER] [--json OUT]

llama.cpp comes with llama-cpp-python's source and is built under --llama (default FOLDER; minutes). All forms start
from FOLDER/BF16.gguf: the demo model's dequantised weights. Their importance matrix is of the text that `quantize`
calibrates on, in the same windows of the same tokens. A form's weights are dequantised exactly and run in float32, so
that what is compared is what was stored. What is there is not made again. Two things about this model matter:

SmolLM2's rows have 576 or 1,536 values, and 576 takes no blocks of 256: most matrices of a K or IQ form fall back to
wider types. So bytes are compared, not names; and `down:TYPE` quantises the down projections alone (1,536 values a row,
where nothing falls back) and leaves the rest in BF16, as `quantize --scheme bf16,dense.down=SCHEME` does.

The demo model was in Q4_1 before: 32 neighbours lie on 16 evenly spaced levels, which a 4-bit form with groups of 32
and a minimum finds again. --shuffle starts from the same function with its channels in another order, so that
neighbours have nothing in common; ours are then made from that file: `quantize FOLDER/BF16.gguf`.

--check runs llama.cpp's own llama-perplexity on forms and sets its divergence beside ours at the same positions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from peers.ggufs import write_gguf
from quality import run
from undistilled import show_quality
from undistilled.checkpoint.gguf import GGUFFile
from undistilled.checkpoint.resolve import Model, find
from undistilled.compress import material
from undistilled.compress.run import Request
from undistilled.prove import divergence
from undistilled.prove.compare import rows
from undistilled.prove.inputs import CHARACTERS, read_text
from undistilled.prove.measure import with_model
from undistilled.prove.plans import proven_plan
from undistilled.prove.score import Scorer

SOURCE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-tokenize")
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_SERVER=OFF")
FOURS = ["Q4_1", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS"]
TYPES = ["Q8_0", "Q6_K", "Q5_K_M", *FOURS, "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_S"]
DOWN = "down:"
KEPT = ("attn=bf16", "ffn_gate=bf16", "ffn_up=bf16")  # of a form of the down projections
EXACT = "bf16,attention=fp32,dense=fp32,embed=fp32,head=fp32"  # every weight in float32, the cache as the original's
WINDOW = 512
FIGURES = {  # of llama-perplexity's report
    "kl_llama": r"Mean +KLD: +(\S+)",
    "top1_llama": r"Same top p: +(\S+)",
    "perplexity_llama": r"Mean PPL\(Q\) +: +(\S+)",
}


def command(*argv: object, log: Path | None = None) -> str:
    """What a command prints, both streams, kept in `log`. SystemExit with its end where it fails."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*map(str, argv)], text=True, errors="replace", **both)
    if log:
        log.write_text(done.stdout)
    if done.returncode:
        raise SystemExit(f"{argv[0]} failed ({done.returncode}): {done.stdout[-1500:]}")
    return done.stdout


def built(folder: Path) -> Path:
    """The folder of llama.cpp's tools, built where they are not there; an interrupted build goes on."""
    bins = folder / "build" / "bin"
    if all((bins / tool).exists() for tool in TOOLS):
        return bins
    source = folder / "src"
    if not list(source.glob("*.tar.gz")):
        asked = ["--no-deps", "--no-binary", SOURCE.split("=")[0], "-d", source, SOURCE]
        command(sys.executable, "-m", "pip", "download", *asked)
    if not list(source.glob("*/vendor/llama.cpp")):
        with tarfile.open(next(source.glob("*.tar.gz"))) as packed:
            packed.extractall(source, filter="data")
    command("cmake", "-S", next(source.glob("*/vendor/llama.cpp")), "-B", folder / "build", *FLAGS)
    command("cmake", "--build", folder / "build", "-j", "2", "--target", *TOOLS, log=folder / "build.log")
    return bins


def original(folder: Path, model: Model, shuffle: bool) -> Path:
    """The one BF16 file that all forms are made from."""
    import gguf

    path = folder / "BF16.gguf"
    if not path.exists():
        reader = gguf.GGUFReader(model.path)
        write_gguf(gguf, shuffled(gguf, reader) if shuffle else reader, gguf.GGMLQuantizationType.BF16, path)
    return path


def shuffled(gguf, reader) -> SimpleNamespace:
    """The same model, with the residual stream's, each MLP's and each value head's channels in a random order."""
    orders, tensors = Orders(reader.fields), []
    for tensor in reader.tensors:
        data, (out, into) = gguf.quants.dequantize(tensor.data, tensor.tensor_type), orders.of(tensor.name)
        data = data[..., into] if out is None else data[out][..., into]
        tensors.append(SimpleNamespace(name=tensor.name, data=data, tensor_type=gguf.GGMLQuantizationType.F32))
    return SimpleNamespace(fields=reader.fields, tensors=tensors)


class Orders:
    """Random orders of a Llama's channels, drawn once, as GGUF names and lays out its tensors."""

    def __init__(self, fields) -> None:
        size = {key.split(".", 1)[1]: int(f.contents()) for key, f in fields.items() if key.startswith("llama.")}
        rng, width = np.random.default_rng(0), size["rope.dimension_count"]
        self.stream = rng.permutation(size["embedding_length"])
        layers, queries, values = size["block_count"], size["attention.head_count"], size["attention.head_count_kv"]
        self.inner = [rng.permutation(size["feed_forward_length"]) for _ in range(layers)]
        heads = [np.stack([rng.permutation(width) for _ in range(values)]) for _ in range(layers)]
        self.values = [self._whole(order) for order in heads]
        self.mixed = [self._whole(order.repeat(queries // values, axis=0)) for order in heads]

    @staticmethod
    def _whole(order: np.ndarray) -> np.ndarray:
        """Orders within heads [heads, width] -> one of all their channels."""
        return (order + order.shape[1] * np.arange(len(order))[:, None]).ravel()

    def of(self, name: str) -> tuple[np.ndarray | None, np.ndarray]:
        """Orders of a tensor's rows (None: they stay) and of its last dimension."""
        block, kind = (int(name.split(".")[1]), name.split(".")[2]) if name.startswith("blk.") else (0, "")
        special = {
            "ffn_gate": (self.inner[block], self.stream),
            "ffn_up": (self.inner[block], self.stream),
            "ffn_down": (self.stream, self.inner[block]),
            "attn_v": (self.values[block], self.stream),
            "attn_output": (self.stream, self.mixed[block]),
        }
        return special.get(kind, (None, self.stream))


def importance(folder: Path, bins: Path, model: Model, request: Request) -> Path:
    """llama.cpp's importance matrix over the tokens that `quantize` calibrates on. SystemExit where they differ."""
    path, text = folder / "imatrix.gguf", folder / "calibration.txt"
    if path.exists():
        return path
    text.write_text(material.read(request.text), encoding="utf-8")
    same_tokens(folder, bins, text, [t for window in material.cut(model, request) for t in window])
    part, chunks = path.with_name("part.gguf"), request.tokens // WINDOW
    asked = ["-m", folder / "BF16.gguf", "-f", text, "-o", part, "-c", WINDOW, "--chunks", chunks, "--no-ppl"]
    command(bins / "llama-imatrix", *asked, log=folder / "imatrix.log")
    part.rename(path)
    return path


def same_tokens(folder: Path, bins: Path, text: Path, ours: list[int]) -> None:
    printed = command(bins / "llama-tokenize", "-m", folder / "BF16.gguf", "-f", text, "--ids", "--log-disable")
    theirs = json.loads(printed[printed.rindex("[") :])[: len(ours)]
    if theirs != ours:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        raise SystemExit(f"llama.cpp reads {text} as other tokens than ours from token {at} on.")


def file_of(folder: Path, kind: str) -> Path:
    return folder / f"llama-{kind.replace(':', '-')}.gguf"


def form(folder: Path, bins: Path, kind: str, matrix: Path) -> Path:
    """A quantised file; its log says which tensors fell back."""
    path = file_of(folder, kind)
    part, base, options = path.with_suffix(".part"), kind, ["--imatrix", matrix]
    if kind.startswith(DOWN):
        base = "Q4_0"  # of no tensor: each has its type said
        options += ["--token-embedding-type", "bf16"]
        for each in (*KEPT, f"ffn_down={kind.removeprefix(DOWN).lower()}"):
            options += ["--tensor-type", each]
    if not path.exists():
        command(bins / "llama-quantize", *options, folder / "BF16.gguf", part, base, 2, log=path.with_suffix(".log"))
        part.rename(path)
    return path


def receipt(path: Path, first: str, tokens: int) -> Path:
    out = path.parent / f"receipt-{path.stem}.json"
    if not out.exists():
        asked = ["--original", first, "--scheme", EXACT, "--dtype", "float32", "--tokens", tokens]
        run("prove", path, *asked, "-o", out)
        print(f"{path.stem} done", file=sys.stderr, flush=True)
    return out


def table(folder: Path, receipts: list[Path]) -> list[dict]:
    """quality.py's rows, with the bytes of the file's tensors in place of those of the float32 that were run."""
    found = rows(receipts)
    for row in found:
        kept = json.loads((folder / f"{row['name']}.json").read_text())
        row["scheme"] = row["name"].removeprefix("receipt-")
        by_type: dict[str, int] = {}
        for tensor in GGUFFile(folder / f"{row['scheme']}.gguf").tensors.values():
            by_type[tensor.type] = by_type.get(tensor.type, 0) + tensor.nbytes
        size = sum(by_type.values())
        row |= {"bytes": size, "bytes_by_type": by_type, "bits_per_weight": 8 * size / kept["model"]["parameters"]}
        row |= {"kl_se": kept["kl_nats"]["se"], "perplexity": kept["perplexity"], "decode_tokens_per_s": None}
    return sorted(found, key=lambda row: row["bytes"])


def checked(folder: Path, bins: Path, kinds: list[str], tokens: int) -> list[dict]:
    """Mean divergence and agreement of forms at the same positions: llama-perplexity's, in its arithmetic, and ours."""
    text, base = folder / "evaluation.txt", folder / "base.logits"
    text.write_text(read_text(None)[1], encoding="utf-8")
    model = find(str(folder / "BF16.gguf"))
    ids = model.tokenizer().encode(text.read_text()[: tokens * CHARACTERS], control=False)
    cut = divergence.windows(ids, WINDOW, tokens)
    asked = [bins / "llama-perplexity", "-c", WINDOW, "--chunks", len(cut), "--kl-divergence-base", base]
    command(*asked, "-m", model.path, "-f", text, log=folder / "base.log")
    before, found = later_halves(model, cut), []
    for kind in kinds:
        path = file_of(folder, kind)
        theirs = command(*asked, "-m", path, "--kl-divergence", log=folder / f"check-{path.stem}.log")
        found.append({"name": path.stem} | measured(theirs) | compared(before, later_halves(find(str(path)), cut)))
    base.unlink()
    return found


def later_halves(model: Model, cut: list[list[int]]):
    """Float32 log-probabilities [positions, V] of the second halves of windows, where llama-perplexity looks."""
    import torch

    plan, half = proven_plan(model, None, EXACT, None, "float32"), WINDOW // 2
    return with_model(
        model,
        plan,
        lambda decoder: torch.cat([Scorer(decoder, plan).logits(w)[half:-1].log_softmax(-1) for w in cut]),
    )


def measured(printed: str) -> dict:
    return {name: float(re.search(pattern, printed)[1]) for name, pattern in FIGURES.items()}


def compared(before, after) -> dict:
    """Ours, as `prove` computes it. [positions, V] float32 log-probabilities."""
    pairs = zip(before.split(WINDOW), after.split(WINDOW), strict=True)
    kl = sum(float(divergence.kl_rows(divergence.exact(a), divergence.exact(b)).sum()) for a, b in pairs)
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    return {"kl_ours": kl / len(before), "top1_ours": 100 * float(same), "positions": len(before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shuffle", action="store_true", help="start from the same model with its channels reordered")
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--check", nargs="*", default=[], help="forms that llama-perplexity measures too")
    parser.add_argument("--llama", type=Path, help="where llama.cpp is built")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bins, model = built(args.llama or args.folder), find("smollm2")
    forms = [original(args.folder, model, args.shuffle)]
    first = str(forms[0]) if args.shuffle else "smollm2"  # what quality.py compares ours with
    matrix = importance(args.folder, bins, model, Request(text=args.calibrate, tokens=args.calibration_tokens))
    forms += [form(args.folder, bins, kind, matrix) for kind in args.types]
    found = table(args.folder, [receipt(path, first, args.tokens) for path in forms])
    show_quality.compared(found, None)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    for each in checked(args.folder, bins, args.check, args.tokens) if args.check else []:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
