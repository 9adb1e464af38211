"""Train r1-nano from scratch, or go on where the last run stopped: tokenizer, training, checkpoints, curves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact
from ..model.spec import spec_from_config
from ..ops.registry import force_reference
from ..prove import suite
from ..prove.levels import LEVELS
from . import ranks, vocabulary
from .evaluate import HeldOut
from .examples import answer_text, read_prose
from .export import export
from .loop import Recipe, Trainer
from .nano import CONFIG, CONTEXT, VOCABULARY
from .packing import PROSE, Batches, loader
from .picture import draw

SEEN_BY_TOKENIZER = 40_000  # questions that the tokenizer is learned from
HELD_OUT = 48  # questions of each task in the checks during training
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """minutes: after which this run stops and saves; the recipe may need several. workers: that make questions."""

    recipe: Recipe
    prose: Path
    minutes: float
    workers: int = 0
    activations: str = "keep"
    zero: bool = False
    compiled: bool = False
    check_every: int = 500


def train(folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """Train in `folder` until the recipe is done or the minutes are over; returns the last check."""
    until = perf_counter() + 60 * options.minutes
    device = ranks.start()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare(folder, options.prose, say)
    with force_reference() if device.type == "cpu" else nullcontext():  # the CPU's kernels have no gradients
        return _train(folder, options, tokenizer, device, until, say)


def _train(
    folder: Path, options: Options, tokenizer: Tokenizer, device: torch.device, until: float, say: Say
) -> dict[str, Any]:
    recipe = options.recipe
    trainer = Trainer(
        spec_from_config(CONFIG),
        recipe,
        device,
        activations=options.activations,
        zero=options.zero,
        compiled=options.compiled,
    )
    if trainer.resume(folder):
        say(f"going on from step {trainer.step}, {trainer.seconds:.0f} s of {recipe.seconds:.0f}")
    say(f"{sum(p.numel() for p in trainer.student.parameters()) / 1e6:.1f} M parameters on {device}")
    batches = Batches(folder, recipe.tokens, recipe.seed + 1000 * ranks.rank(), first=trainer.step)
    samples = loader(batches, options.workers)
    held_out = HeldOut(tokenizer, HELD_OUT, recipe.tokens)
    log = Log(folder / "log.jsonl", say)
    check: dict[str, Any] = {}
    while not trainer.done and perf_counter() < until:
        trainer.run(samples, options.check_every, until, log)
        check = held_out(trainer.student, device) | {"step": trainer.step, "seconds": trainer.seconds}
        log(check)
    trainer.save(folder)
    if ranks.leads():
        draw(log.file, folder / "curves.svg")
        for name, fp8 in (("r1-nano", True), ("r1-nano-bf16", False)):
            export(trainer.student.decoder.spec, CONFIG, trainer.student.named, folder / name, fp8=fp8)
            vocabulary.copy(folder, folder / name)
    return check


def prepare(folder: Path, prose: Path, say: Say) -> Tokenizer:
    """The tokenizer, and the prose in its tokens; both are made on the first run."""
    if not (folder / PROSE).exists() and ranks.leads():
        text = read_prose(prose)
        say(f"learning a vocabulary of {VOCABULARY} from the prose and {SEEN_BY_TOKENIZER} questions")
        vocabulary.write(vocabulary.learn(itertools.chain([text], _texts()), VOCABULARY), folder, CONTEXT)
        ids = Tokenizer.from_folder(folder).encode(text, control=False)
        np.save(folder / PROSE, np.asarray(ids, dtype=np.uint16))
    ranks.wait()
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != VOCABULARY:
        raise BadArtefact(f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, not {VOCABULARY}.")
    return tokenizer


def _texts() -> Iterator[str]:
    """Questions and their answers from the training side, of every task alike."""
    random = Random("vocabulary")
    kinds = [(task, level) for task in sorted(LEVELS) for level in range(len(LEVELS[task]))]
    for task, level in kinds:
        items = suite.stream(task, level, random.randrange(1 << 40), test=False)
        for item in itertools.islice(items, SEEN_BY_TOKENIZER // len(kinds)):
            yield "\n".join((item.question, *answer_text(item)))


class Log:
    """One JSON object a line, and a line for people."""

    def __init__(self, file: Path, say: Say) -> None:
        self.file, self.say = file, say

    def __call__(self, news: dict[str, Any]) -> None:
        if not ranks.leads():
            return
        with self.file.open("a") as f:
            f.write(json.dumps(news) + "\n")
        if "exact" in news:
            low = sorted(news["exact"].items(), key=lambda kind: kind[1])[:4]
            worst = ", ".join(f"{task} {share:.2f}" for task, share in low)
            self.say(f"step {news['step']}: exact {news['exact_mean']:.3f}, second {news['second_token']:.3f}; {worst}")
        elif news["step"] % 100 == 0:
            self.say(
                f"step {news['step']} ({news['seconds']:.0f} of {news['of']:.0f} s)  "
                f"loss {news['loss']:.4f}  second {news['second_loss']:.4f}  "
                f"{news['tokens_per_s'] / 1e3:.0f}k tokens/s  busiest expert {news['busiest_expert']:.1f}x"
            )
