"""A folder in transformers, in BF16 or, behind a colon, in another dtype: greedy steps with its default cache."""

from time import perf_counter

import torch
import transformers
from measured import main


class Transformers:
    def __init__(self, model, threads):
        folder, _, dtype = model.partition(":")
        torch.set_num_threads(threads)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=getattr(torch, dtype or "bfloat16")).eval()

    @torch.inference_mode()
    def run(self, prompts, new):
        began = perf_counter()
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        first = perf_counter()
        for _ in range(new):
            out = self.model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return first - began, perf_counter() - first

    @torch.inference_mode()
    def logits(self, tokens):
        return self.model(torch.tensor([tokens])).logits[0].float()


if __name__ == "__main__":
    main(Transformers)
