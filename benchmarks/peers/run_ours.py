"""SmolLM2 in a scheme of ours; the model's argument is the scheme, or a folder that `quantize` made, with a dtype of
products behind a colon."""

from pathlib import Path

import undistilled  # noqa: F401  # before torch, as its commands do: PyTorch's threads then do not spin while ours work

# isort: split
import torch
from measured import NEW, PROMPT, TOGETHER, main

from undistilled.generate.engine import open_engine
from undistilled.observe.bench import once
from undistilled.prove.score import Scorer


class Ours:
    def __init__(self, model, threads):
        form, _, dtype = model.partition(":")
        named = {"model": form} if Path(form).is_dir() else {"model": "smollm2", "scheme": form}
        torch.set_num_threads(threads)
        self.engine = open_engine({**named, "dtype": dtype or "auto", "device": "cpu",
                                   "batch": TOGETHER, "context": PROMPT + NEW + 1})  # fmt: skip

    def run(self, prompts, new):
        count, length = len(prompts), len(prompts[0])
        reading, writing = once(self.engine, length, new + 1, count)
        return count * length / reading, count * new / writing

    def logits(self, tokens):
        return Scorer(self.engine.decoder, self.engine.plan).logits(tokens)


if __name__ == "__main__":
    main(Ours)
