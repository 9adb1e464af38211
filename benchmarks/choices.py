"""Multiple-choice accuracy of several forms of one model, in packed passes: what `prove --tasks` asks, but faster.

    python benchmarks/choices.py TASK.jsonl.gz FOLDER ORIGINAL FORM... [--limit 1000] [--tokens 1024]

FORM: a checkpoint, or NAME=SCHEME for ORIGINAL in that scheme. Contexts with each of their choices are documents end
to end, without a cache, so that a pass has hundreds of rows where a question alone has twenty; products are float32.
`prove` scores in the chunks, and with the cache, that serving uses. What each form gives a choice is kept in FOLDER, a
line a document: a run that was ended goes on there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch

from undistilled.checkpoint.resolve import Model, find
from undistilled.model.batch import Packed
from undistilled.model.decoder import Decoder
from undistilled.prove.measure import with_model
from undistilled.prove.plans import proven_plan
from undistilled.prove.tasks import Encoded, compare, encode_task, read_task

Document = tuple[int, int, list[int], int]  # (question, choice, ids, how many of them are context)


def documents(encoded: list[Encoded]) -> Iterator[Document]:
    for at, e in enumerate(encoded):
        yield from ((at, i, e.context + choice, len(e.context)) for i, choice in enumerate(e.choices))


def packs(every: list[Document], tokens: int) -> Iterator[list[Document]]:
    """As many documents together as have `tokens` tokens."""
    some: list[Document] = []
    for document in every:
        if some and sum(len(ids) for _, _, ids, _ in some) + len(document[2]) > tokens:
            yield some
            some = []
        some.append(document)
    yield some


@torch.inference_mode()
def likelihoods(decoder: Decoder, some: list[Document]) -> list[float]:
    """Natural log-likelihood of each document's choice after its context."""
    sizes, device = [len(ids) for _, _, ids, _ in some], decoder.device
    positions = torch.cat([torch.arange(n) for n in sizes]).to(device)
    bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    ids = torch.tensor([t for _, _, ids, _ in some for t in ids], device=device)
    hidden_TD = decoder(Packed(ids, positions, bounds.to(device), max(sizes)), [()] * len(decoder.layers))
    starts = zip(some, sizes, bounds[:-1].tolist(), strict=True)
    wanted = [torch.arange(at + before - 1, at + n - 1) for (_, _, _, before), n, at in starts]
    rows = torch.cat(wanted).to(device)
    log_RV = decoder.logits(hidden_TD[rows]).log_softmax(-1)
    found = log_RV.gather(-1, ids[rows + 1][:, None])[:, 0].double()
    return [float(part.sum()) for part in found.split([len(w) for w in wanted])]


def scored(model: Model, scheme: str | None, encoded: list[Encoded], tokens: int, file: Path) -> list[float]:
    """The likelihood of each document; `file` has those that are known, and gets the rest."""
    known = file.read_text().rpartition("\n")[0].split() if file.exists() else []  # a kill may cut a line short
    file.write_text("".join(f"{line}\n" for line in known))
    left = list(documents(encoded))[len(known) :]

    def run(decoder: Decoder) -> None:
        with file.open("a") as f:
            for some in packs(left, tokens):
                f.write("".join(f"{total}\n" for total in likelihoods(decoder, some)))
                f.flush()

    if left:
        with_model(model, proven_plan(model, None, scheme, None, "float32"), run)
    return [float(line) for line in file.read_text().split()]


def chosen(encoded: list[Encoded], totals: list[float]) -> list[int]:
    """The index that each question's choices have the most of, by likelihood a character."""
    each = iter(totals)
    scores = [[next(each) / length for length in e.lengths] for e in encoded]
    return [some.index(max(some)) for some in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("original")
    parser.add_argument("forms", nargs="*")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    task, before = read_task(args.task, args.limit), None
    for form in ["original=", *args.forms]:
        name, sign, scheme = form.partition("=")
        file = args.folder / f"{task.name}-{args.limit}-{Path(name).name}.txt"
        model = find(args.original if sign else name)
        began, encoded = perf_counter(), encode_task(task, model.tokenizer(), model.spec.max_context)
        now = chosen(encoded, scored(model, scheme or None, encoded, args.tokens, file))
        print(f"{name}: {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        before = before or now
        print(json.dumps({"form": name} | compare(task, before, now)), flush=True)


if __name__ == "__main__":
    main()
