"""What r1-nano's README reports beside its accuracy: its agreement with transformers, its MTP layer, its experts.

    python benchmarks/nano.py agree|mtp|experts [--model r1-nano] [--questions 6]

agree: each token of greedy answers against transformers' most likely one (float32, dequantised weights).
mtp: how often the MTP layer, given the token just chosen, names the one after it, over greedy answers.
experts: the share of the choices that each expert gets over held-out questions and their answers, by layer.
`accuracy` is `undistilled prove MODEL --suite`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from undistilled.checkpoint.resolve import Model, find
from undistilled.generate.engine import Engine
from undistilled.load.build import build
from undistilled.model.batch import Packed
from undistilled.model.decoder import Decoder
from undistilled.model.layers import MoeLayer
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve
from undistilled.prove import suite
from undistilled.prove.answers import prompts
from undistilled.prove.levels import LEVELS
from undistilled.schedule.request import Request, Sampling

Exchange = tuple[list[int], list[int]]  # ids of a prompt and of its answer


def answered(model: Model, questions: int, kv: str | None = None) -> tuple[Decoder, list[Exchange]]:
    """A loaded decoder, MTP layer included, and its greedy answers to `questions` of every task."""
    ask = Ask(None, 1024, 31, True, "cpu", kv, dtype="float32")
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    decoder = build(plan, model.spec, model.source())
    engine = Engine(decoder, plan, model.tokenizer(), model.name)
    items = [item for task in LEVELS for item in suite.test_items(task, questions)]
    asked = prompts(model.tokenizer(), items, model.name)
    sampling = Sampling(max_tokens=512, temperature=0)
    found = engine.run_all([Request(str(at), p.ids, sampling) for at, p in enumerate(asked)])
    ids = [[t for output in found[str(at)] for t in output.tokens] for at in range(len(asked))]
    return decoder, [(p.ids, answer) for p, answer in zip(asked, ids, strict=True)]


def alone(ids: list[int]) -> Packed:
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    return Packed(torch.tensor(ids), torch.arange(len(ids)), bounds, len(ids))


@torch.inference_mode()
def agree(model: Model, questions: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import twin

    _, exchanges = answered(model, questions, "float32")
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model"
        link.symlink_to(model.path.resolve())
        theirs = twin(link, model.config)
    whole = right = tokens = 0
    for prompt, answer in exchanges:
        first = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        same = int((first == torch.tensor(answer)).sum())
        whole, right, tokens = whole + (same == len(answer)), right + same, tokens + len(answer)
    print(f"{whole} of {len(exchanges)} answers and {right} of {tokens} tokens are transformers' own")


@torch.inference_mode()
def mtp(model: Model, questions: int) -> None:
    decoder, exchanges = answered(model, questions)
    right = tokens = 0
    for prompt, answer in exchanges:
        ids = prompt + answer
        batch, following = alone(ids), alone(ids[1:] + ids[:1])
        hidden = decoder(batch, [()] * len(decoder.layers))
        decoder.prepare(following)
        second = decoder.mtp[0](hidden, following, ()).argmax(-1)
        places = range(len(prompt) - 1, len(ids) - 2)
        right += sum(int(second[at]) == ids[at + 2] for at in places)
        tokens += len(places)
    print(f"second token: {right} of {tokens} accepted, {right / tokens:.1%}, over {len(exchanges)} answers")


class Counting(torch.nn.Module):
    """A bank that counts how often each expert is chosen."""

    def __init__(self, bank, experts: int) -> None:
        super().__init__()
        self.bank, self.counts = bank, torch.zeros(experts)

    def submit(self, x, ids, weights):
        self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))
        return self.bank.submit(x, ids, weights)

    def collect(self, handle):
        return self.bank.collect(handle)


@torch.inference_mode()
def experts(model: Model, questions: int) -> None:
    decoder, exchanges = answered(model, questions)
    layers = [m for block in decoder.layers for m in block.modules() if isinstance(m, MoeLayer)]
    for layer in layers:
        layer.banks = torch.nn.ModuleList(Counting(b, layer.moe.experts) for b in layer.banks)
    for prompt, answer in exchanges:
        decoder(alone(prompt + answer), [()] * len(decoder.layers))
    print("share of an even load: least, median and most over the experts of each MoE layer")
    for at, layer in enumerate(layers, 1):
        loads = layer.banks[0].counts / layer.banks[0].counts.mean()
        print(f"layer {at:2d}: {loads.min():.2f} {loads.median():.2f} {loads.max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agree", "mtp", "experts"))
    parser.add_argument("--model", default="r1-nano")
    parser.add_argument("--questions", type=int, default=6, help="of each task")
    arguments = parser.parse_args()
    {"agree": agree, "mtp": mtp, "experts": experts}[arguments.what](find(arguments.model), arguments.questions)


if __name__ == "__main__":
    main()
