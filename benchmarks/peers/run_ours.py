"""SmolLM2 in a scheme of ours; the model's argument is the scheme, with a dtype of products behind a slash."""

import torch
from measured import NEW, PROMPT, TOGETHER, main

from undistilled.generate.engine import open_engine
from undistilled.observe.bench import once
from undistilled.prove.score import Scorer


class Ours:
    def __init__(self, model, threads):
        scheme, _, dtype = model.partition("/")
        torch.set_num_threads(threads)
        self.engine = open_engine({"model": "smollm2", "scheme": scheme, "dtype": dtype or "auto", "device": "cpu",
                                   "batch": TOGETHER, "context": PROMPT + NEW + 1})  # fmt: skip

    def run(self, prompts, new):
        count, length = len(prompts), len(prompts[0])
        reading, writing = once(self.engine, length, new + 1, count)
        return count * length / reading, count * new / writing

    def logits(self, tokens):
        return Scorer(self.engine.decoder, self.engine.plan).logits(tokens)


if __name__ == "__main__":
    main(Ours)
